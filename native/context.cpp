// Context-mixing coder of a matrix of signed ranks; integer arithmetic only.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <string>
#include <stdexcept>
typedef int32_t i32; typedef int64_t i64; typedef uint32_t u32; typedef uint64_t u64;
#ifndef PARAMS
#define PARAMS static const
#endif
struct Par {
  // significance
  i32 s_lr=10, s_lrx=30, s_lim=400, s_d=5; // rate, boost, counter limit, prior denominators*2
  i32 s_prow=8, s_pcol=6, s_pci=8, s_pk=16, s_pcur=2, s_pnb=24;
  i32 s_wrow=45, s_wcol=45, s_wci=20, s_wk=20, s_wcur=10, s_wnb=10, s_wcell=10; // weights in 1/64
  // sign
  i32 g_lr=10, g_lim=255, g_d=8, g_w=10, g_lrx=10;
  // magnitude
  i32 m_lr=12, m_lrx=30, m_lim=255, m_d=5, m_w=10, m_wgeo=10, m_p=4;
  i32 s_shift=6, m_shift=2, m_wb=64;
};
PARAMS Par P;
static int16_t ST[65536]; static uint16_t SQ[6144]; static i32 REC[16][1024]; static i32 CONF[1024];
static void tables(){
  static bool done=false; 
  if(!done){
  // e^(-1/256) in 2^-40 units
  const u64 c=1095225096164ull; // 2^40*exp(-1/256)
  u64 e=1ull<<40; // exp(-x/256)
  for(int x=0;x<3072;x++){ u64 p=(1ull<<56)/((1ull<<40)+e); // 65536/(1+e)
    if(p>65535)p=65535; 
    SQ[3072+x]=p; if(x) SQ[3072-x]=65536-p<1?1:65536-p; 
    e=(u64)(((unsigned __int128)e*c)>>40); }
  SQ[0]=1;
  int pi=0; for(int x=-3071;x<3072;x++){ int v=SQ[x+3072]; for(int i=pi;i<=v;i++) ST[i]=x; pi=std::max(pi,v+1);} for(int i=pi;i<65536;i++) ST[i]=3071; }
  done=true;
  for(int d=0;d<16;d++) for(int n=0;n<1024;n++) REC[d][n]=65536*2/(2*n+d+2); 
  for(int n=0;n<1024;n++) CONF[n]=256*2*n/(2*n+3);
}
static inline i32 st(i32 p){return ST[p];}
static inline i32 sq(i32 x){ if(x>3071)x=3071; if(x<-3071)x=-3071; return SQ[x+3072]; }
struct Enc { std::vector<uint8_t> o; u32 x1=0,x2=~0u;
  int code(int bit,u32 p){ u32 xm=x1+(u32)(((u64)(x2-x1)*p)>>16); if(bit)x2=xm; else x1=xm+1;
    while(!((x1^x2)>>24)){ o.push_back(x2>>24); x1<<=8; x2=x2<<8|255;} return bit; }
  void flush(){ for(int k=1;k<=4;k++){ u32 m=k==4?0:(0xFFFFFFFFu>>(8*k)); u64 v=((u64)x1+m)&~(u64)m; if(v<=x2){ for(int j=0;j<k;j++)o.push_back(v>>(24-8*j)); break;} } while(!o.empty()&&o.back()==0)o.pop_back(); }
};
struct Dec { const uint8_t*d; size_t n,pos=0; u32 x1=0,x2=~0u,x=0;
  Dec(const uint8_t*d,size_t n):d(d),n(n){ for(int i=0;i<4;i++)x=x<<8|get(); }
  u32 get(){ u32 v=pos<n?d[pos]:0; pos++; return v; }
  int code(int,u32 p){ u32 xm=x1+(u32)(((u64)(x2-x1)*p)>>16); int bit=x<=xm; if(bit)x2=xm; else x1=xm+1;
    while(!((x1^x2)>>24)){ x1<<=8; x2=x2<<8|255; x=x<<8|get(); } return bit; }
};

struct Mix { int n; std::vector<i32> w; i32 init[32]; u32 t=0; };
template<class C> struct Model {
  C& c;
  Model(C&c):c(c){ tables(); }
  typedef u32 Cell; // p 22 bits | n 10 bits
  i32 x[32]; int n; u32* cells[32]; int nc;
  // adds a cell input as deviation from base
  inline void cell(u32* k,i32 base,i32 basep,i32 conf=1){ cells[nc++]=k; if((*k&1023)==0) *k=(u32)basep<<16; x[n++]=((st(*k>>16)-base)*CONF[*k&1023])>>8; }
  inline void upd(int bit,i32 d,u32 lim){ for(int i=0;i<nc;i++){ u32 k=*cells[i]; u32 cn=k&1023; i32 p=k>>10; p+=(i32)(((i64)((bit?4194303:0)-p)*REC[d][cn])>>16); if(cn<lim)cn++; *cells[i]=(u32)p<<10|cn; } }
  inline int mixcode(int bit,i32*w1,i32*w2,i32 base,i32 lr){
    i64 d1=0,d2=0; for(int i=0;i<n;i++){ d1+=(i64)w1[i]*x[i]; d2+=(i64)w2[i]*x[i]; }
    i32 a=base+(i32)(d1>>16),b=base+(i32)(d2>>16);
    i32 p1=sq(a),p2=sq(b),p=sq((a+b)>>1); 
    bit=c.code(bit,p);
    i32 t=bit?65536:0; i64 e1=(i64)(t-p1)*lr,e2=(i64)(t-p2)*lr;
    for(int i=0;i<n;i++){ w1[i]+=(i32)((e1*x[i]+(1<<19))>>20); w2[i]+=(i32)((e2*x[i]+(1<<19))>>20); }
    return bit; }
  static inline i32 clampp(i64 p){ return p<1?1:p>65535?65535:(i32)p; }
  static inline int q(i32 d,int s,int half){ d=(d>>s)+half; return d<0?0:d>=2*half?2*half-1:d; }
  static int bucket(u32 m,int&ex){ if(m<8){ex=0;return m;} int e=31-__builtin_clz(m); ex=e-2; return 8+(e-3)*4+((m>>(e-2))&3); }
  void run(i32* r,i64 rows,i64 cols,i64 k,i64 S,u32 K){
    i64 cin=cols/k;
    std::vector<u32> colNZ(cols+2*S+2,0),colM(cols,0),ciNZ(cin,0),ciM(cin,0),kNZ(k,0); std::vector<i32> colS(cols,0);
    std::vector<u32> T(1<<17,0); std::vector<u32> TS(1<<14,0); i64 kpx=std::min<i64>(k,64);
    std::vector<u32> colcell(cols,0);
    const int NI=32; 
    i32 iw[NI]={0}; { int j=0; iw[j++]=P.s_wrow; iw[j++]=P.s_wcol; iw[j++]=P.s_wci; iw[j++]=k>1?P.s_wk:0; iw[j++]=k>1?P.s_wcur:0; iw[j++]=P.s_wnb; j++; for(int i=0;i<9;i++) iw[j++]=P.s_wcell; }
    for(auto&v:iw)v*=1024;
    std::vector<i32> wa(NI*64),wb(NI*64); for(int i=0;i<64*NI;i++) wa[i]=wb[i]=iw[i%NI];
    std::vector<i32> ga(NI),gb(NI*64); for(int i=0;i<64*NI;i++){ i32 v=i%NI<6?P.g_w*1024:0; if(i<NI)ga[i]=v; gb[i]=v; }
    i32 im[NI]={0}; { for(int i=0;i<10;i++)im[i]=P.m_w*1024; for(int i=10;i<13;i++)im[i]=P.m_wgeo*1024; }
    std::vector<i32> ma(NI),mb(NI*128); for(int i=0;i<128*NI;i++){ mb[i]=im[i%NI]; if(i<NI)ma[i]=im[i]; }
    std::vector<u32> M(128*16*256/4+4096,0); // magnitude cells
    std::vector<u32> mbase(128,0),xb(128*8,0);
    u64 gNZ=0,gN=0,gM=0; u32 sigT=0,sgT=0,mgT=0; u32 sbase=0;
    int ex; int NB=bucket(K-1,ex); // last bucket index
    for(i64 y=0;y<rows;y++){ u64 rn=0,rnz=0,rm=0; int gap=0,last=0; u32 cur=0; i64 curM=0; i64 recM=0,recC=0; i32 rowS=0; 
      for(i64 X=0;X<cols;X++){ i64 ci=X/k,kp=X%k; if(kp==0){cur=0;curM=0;}
        i32*v=r+y*cols+X; i32 W=X>0?v[-1]:0,WW=X>1?v[-2]:0,N=y>0?v[-cols]:0,NW=y>0&&X>0?v[-cols-1]:0,NE=y>0&&X+1<cols?v[-cols+1]:0,NN=y>1?v[-2*cols]:0,U=X>=S?v[-S]:0,Cc=X>=k?v[-k]:0;
        if(k==1) Cc=X>=S+1?v[-S-1]:0;
        i64 g=clampp((i64)((gNZ*65536+32768)/(gN+1))); if(g<8)g=8; i32 sg=st(g);
        i32 drow=clampp((rnz*65536+P.s_prow*g)/(rn+P.s_prow)),dcol=clampp(((u64)colNZ[X+S]*65536+P.s_pcol*g)/(y+P.s_pcol)),dci=clampp(((u64)ciNZ[ci]*65536+P.s_pci*g)/(y*k+kp+P.s_pci)),dk=clampp(((u64)kNZ[kp]*65536+P.s_pk*g)/(y*cin+ci+P.s_pk)),dcur=clampp(((u64)cur*65536+P.s_pcur*g)/(kp+P.s_pcur));
        u64 nbz=(u64)colNZ[X+S-1]+colNZ[X+S+1]+colNZ[X]+colNZ[X+2*S]; i32 dnb=clampp((nbz*65536+P.s_pnb*g)/(4*y+2+P.s_pnb));
        n=nc=0; i32 er=st(drow)-sg,ec=st(dcol)-sg,ei=st(dci)-sg,ek=st(dk)-sg,eu=st(dcur)-sg,en=st(dnb)-sg;
        x[n++]=er;x[n++]=ec;x[n++]=ei;x[n++]=ek;x[n++]=eu;x[n++]=en;x[n++]=64;
        int s=P.s_shift; int qr=q(er,s,8),qc=q(ec,s,8),qi=q(ei,s,8),qu=q(eu,7,4),qn=q(en,s,8);
        int nb=(W!=0)|(WW!=0)<<1|(N!=0)<<2|(NW!=0)<<3|(NE!=0)<<4|(NN!=0)<<5; int nu=(U!=0)|(Cc!=0)<<1; int kq=std::min<i64>(kp,63);
        i32 bp=g; u32*t=T.data();
        cell(t+nb,sg,bp); t+=64; cell(t+qr*16+qc,sg,bp); t+=256; cell(t+qi*16+qr,sg,bp); t+=256; cell(t+kq*16+(nb&7)+(nu&1)*8,sg,bp); t+=1024; cell(t+(qu*64+kq)*16+qr,sg,bp); t+=8192; cell(t+std::min(gap,63),sg,bp); t+=64; cell(t+((qi*16+qr)*16+qc)*2+(W!=0),sg,bp); t+=8192; cell(t+((nb&7)|nu<<3)*16+qn,sg,bp); t+=512; cell(t+qn*16+qc,sg,bp);
        i32 lr=P.s_lr+P.s_lrx*64/(64+(sigT>>4)); 
        int nz=mixcode(*v!=0,&wa[0],&wb[NI*kq],sg,lr); sigT++;
        upd(nz,P.s_d,P.s_lim);
        if(nz){
          // sign
          n=nc=0; auto sgn=[](i32 a){return a==0?0:a<0?1:2;}; auto sx=[](i32 a){return a==0?0:a<0?256:-256;};
          u32*t=TS.data(); cell(t+sgn(W)*3+sgn(WW),0,32768); t+=16; cell(t+sgn(N)*9+sgn(W)*3+sgn(NN),0,32768); t+=32; cell(t+sgn(U)*9+sgn(Cc)*3+sgn(W),0,32768); t+=32; cell(t+kq,0,32768); t+=64; cell(t+last,0,32768); t+=16; cell(&colcell[X],0,32768);
          x[n++]=sx(W);x[n++]=sx(N);x[n++]=sx(U);x[n++]=sx(Cc);x[n++]=sx(NW);x[n++]=sx(NE); x[n++]=std::max(-1024,std::min(1024,(rowS*512)/(i32)(rnz+4))); x[n++]=32;
          i32 lr=P.g_lr+P.g_lrx*64/(64+(sgT>>2));
          int neg=mixcode(*v<0,&ga[0],&gb[NI*kq],0,lr); sgT++; upd(neg,P.g_d,P.g_lim);
          u32 m=(*v<0?-*v:*v)-1; int e; int B=bucket(m,e);
          u64 gm=(gM*16+16)/(gNZ+1); // mean bucket x16
          u64 mp=P.m_p; i64 mr=(rm*16+mp*gm)/(rnz+mp),mc=((u64)colM[X]*16+mp*gm)/(colNZ[X+S]+mp),mi=((u64)ciM[ci]*16+mp*gm)/(ciNZ[ci]+mp),mq=(recM+2*gm*16)/(recC+2*16),mk=(curM*16+2*gm)/(cur+2);
          auto q2=[&](i64 a){ i64 d=(a-(i64)gm)*16/(i64)(gm+8); d=(d>>P.m_shift)+4; return d<0?0:d>7?7:(int)d; };
          int a=q2(mr),b=q2(mi),d=q2(mc),f=q2(mq),h=q2(mk); int dmy; auto bk=[&](i32 z){return z?std::min(6,bucket(std::abs(z)-1,dmy)*2*16/(int)(gm+8)+1):0;}; 
          int nW=std::min(3,bk(W)),nN=std::min(3,bk(N)),nU=std::min(3,bk(U)),nC=std::min(3,bk(Cc));
          int val=0; 
          for(int i=0;i<NB;i++){ n=nc=0; u32*bc=&mbase[i]; if(!(*bc&1023))*bc=(i?(mbase[i-1]>>16<<16):(u32)32768<<16); i32 bp=*bc>>16,base=st(bp);
            u32*t=M.data()+i*1024; 
            cell(t+neg,base,bp); t+=2; cell(t+a,base,bp); t+=8; cell(t+b,base,bp); t+=8; cell(t+d,base,bp); t+=8; cell(t+f,base,bp); t+=8; cell(t+h,base,bp); t+=8; cell(t+a*8+d,base,bp); t+=64; cell(t+kq,base,bp); t+=64; cell(t+nW*4+nN,base,bp); t+=16; cell(t+nU*4+nC,base,bp); t+=16;
            // geometric deviations
            auto geo=[&](i64 mean){ return (i32)(std::min<i64>(512,std::max<i64>(-512,(mean-(i64)gm)*256/(i64)(gm+8)))); };
            x[n++]=geo(mr);x[n++]=geo(mc);x[n++]=geo(mi); x[n++]=32;
            cells[nc++]=bc;
            i32 lr=P.m_lr+P.m_lrx*64/(64+(mgT>>2)); mgT++;
            int bit=mixcode(B>i,&ma[0],&mb[NI*i],base,lr); upd(bit,P.m_d,P.m_lim); if(!bit)break; val=i+1; }
          // extra
          u32 mag; if(val<8)mag=val; else { int eb=(val-8)/4+1; u32 top=4+((val-8)&3); u32 ctx=1; mag=top; for(int j=eb-1;j>=0;j--){ int bit=(m>>j)&1; if(ctx<8){ u32*k=&xb[val*8+ctx]; if(!(*k&1023))*k=32768u<<16; nc=0; cells[nc++]=k; i32 p=*k>>16; if(p<64)p=64; if(p>65472)p=65472; bit=c.code(bit,p); upd(bit,P.m_d,P.m_lim); ctx=ctx*2+bit; } else bit=c.code(bit,32768); mag=mag*2+bit; } }
          if(mag>=K) mag=K-1; 
          *v=neg?-(i32)(mag+1):(i32)(mag+1);
          gM+=val; rm+=val; colM[X]+=val; ciM[ci]+=val; recM=recM-(recM>>3)+val*16*2; recC=recC-(recC>>3)+32; curM+=val; rowS+=neg?1:-1; last=neg+1; gap=0;
        } else { *v=0; gap++; }
        rn++; rnz+=nz; colNZ[X+S]+=nz; ciNZ[ci]+=nz; kNZ[kp]+=nz; gN++; gNZ+=nz; cur+=nz;
      } }
  }
};

namespace nb = nanobind;
using In = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
static i64 stride_of(i64 cols,i64 k){ i64 v=k>1?k:cols,s=1; while((s+1)*(s+1)<=v)s++; if(k>1)return s; return s*s==v&&s>3?s:1; }
static void varint(std::vector<uint8_t>&o,u64 v){ while(v>127){o.push_back(v|128);v>>=7;} o.push_back(v); }
NB_MODULE(context, m) {
  m.def("encode", [](In a, int64_t k) {
    i64 rows=a.shape(0), cols=a.shape(1); if(k<1||cols%k) throw nb::value_error("kernel does not divide cols");
    std::vector<uint8_t> out;
    { nb::gil_scoped_release r; std::vector<i32> b(a.data(), a.data()+rows*cols); u32 K=1; for(i32 v:b)K=std::max<u32>(K,std::abs(v));
      varint(out,K); if(rows&&cols){ Enc c; Model<Enc> mo(c); mo.run(b.data(),rows,cols,k,stride_of(cols,k),K); c.flush(); out.insert(out.end(),c.o.begin(),c.o.end()); } }
    return nb::bytes(out.data(), out.size());
  });
  m.def("decode", [](nb::bytes d, int64_t rows, int64_t cols, int64_t k) {
    if(k<1||rows<0||cols<0||cols%k) throw nb::value_error("kernel does not divide cols");
    const uint8_t*p=(const uint8_t*)d.data(); size_t n=d.size(),i=0; u64 K=0; int sh=0; for(;;){ if(i>=n||sh>28) throw nb::value_error("truncated header"); K|=(u64)(p[i]&127)<<sh; sh+=7; if(!(p[i++]&128))break; }
    if(K<1||K>(1u<<20)) throw nb::value_error("largest magnitude out of range");
    i32* buf=new i32[rows*cols+1]; nb::capsule own(buf,[](void*q)noexcept{delete[](i32*)q;});
    if(rows&&cols){ nb::gil_scoped_release r; Dec c(p+i,n-i); Model<Dec> mo(c); mo.run(buf,rows,cols,k,stride_of(cols,k),(u32)K); }
    size_t shape[2]={(size_t)rows,(size_t)cols};
    return nb::ndarray<nb::numpy,i32,nb::ndim<2>>(buf,2,shape,own);
  });
}
