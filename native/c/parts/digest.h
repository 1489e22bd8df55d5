// SHA-256 (FIPS 180-4), with which a plan's file ends.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace gossamer::c {

inline std::array<uint8_t, 32> sha256(const uint8_t* data, size_t size) {
  static constexpr uint32_t k[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
  uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const auto turn = [](uint32_t x, int n) { return x >> n | x << (32 - n); };
  const auto block = [&](const uint8_t* p) {
    uint32_t w[16];  // the last 16 words of the schedule
    for (int i = 0; i < 16; i++)
      w[i] = uint32_t(p[4 * i]) << 24 | uint32_t(p[4 * i + 1]) << 16 | uint32_t(p[4 * i + 2]) << 8 |
             p[4 * i + 3];
    uint32_t v[8];
    std::memcpy(v, h, sizeof v);
    // Variable a of step i lies in v[-i mod 8]: nothing is moved.
    const auto step = [&](int i, uint32_t word) {
      const auto at = [&](int k) -> uint32_t& { return v[(k - i) & 7]; };
      const uint32_t a = at(0), e = at(4);
      const uint32_t one = at(7) + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) +
                           ((e & at(5)) ^ (~e & at(6))) + k[i] + word;
      const uint32_t two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) +
                           ((a & at(1)) ^ (a & at(2)) ^ (at(1) & at(2)));
      at(3) += one;
      at(7) = one + two;
    };
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 16
#endif
    for (int i = 0; i < 16; i++) step(i, w[i]);
    for (int round = 16; round < 64; round += 16)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 16
#endif
      for (int i = 0; i < 16; i++) {
        const uint32_t early = w[(i + 1) & 15], late = w[(i + 14) & 15];
        w[i] += w[(i + 9) & 15] + (turn(early, 7) ^ turn(early, 18) ^ early >> 3) +
                (turn(late, 17) ^ turn(late, 19) ^ late >> 10);
        step(round + i, w[i]);
      }
    for (int i = 0; i < 8; i++) h[i] += v[i];
  };
  size_t at = 0;
  for (; size - at >= 64; at += 64) block(data + at);
  uint8_t last[128] = {};
  const size_t rest = size - at, end = rest < 56 ? 64 : 128;
  if (rest) std::memcpy(last, data + at, rest);
  last[rest] = 0x80;
  for (int i = 0; i < 8; i++) last[end - 1 - size_t(i)] = uint8_t(uint64_t(size) * 8 >> 8 * i);
  for (size_t i = 0; i < end; i += 64) block(last + i);
  std::array<uint8_t, 32> result;
  for (int i = 0; i < 32; i++) result[size_t(i)] = uint8_t(h[i / 4] >> (24 - 8 * (i % 4)));
  return result;
}

}  // namespace gossamer::c
