/* Runs a network of one float32 input and output: classify net.plan image.f32
 * Build, with dir=$(python -c "import gossamer.runtime as r; print(r.include())"):
 *   c++ -std=c++17 -O3 -ffp-contract=off -pthread -c $dir/gossamer.cpp
 *   cc -c -I$dir classify.c && c++ -pthread classify.o gossamer.o -o classify */
#include <stdio.h>
#include <stdlib.h>

#include "gossamer.h"

int main(int argc, char **argv) {
  char message[GOSSAMER_MESSAGE];
  gossamer_network *net;
  gossamer_tensor in, out;
  if (argc != 3) return fprintf(stderr, "usage: classify net.plan image.f32\n"), 2;
  gossamer_status status = gossamer_load(argv[1], &net, message);
  if (!status && !gossamer_input(net, 0, &in) && !gossamer_output(net, 0, &out)) {
    const size_t bytes = gossamer_bytes(&in, 1); /* of a batch of one */
    float *x = (float *)malloc(bytes), *y = (float *)malloc(gossamer_bytes(&out, 1));
    const void *inputs[] = {x};
    void *outputs[] = {y};
    FILE *file = fopen(argv[2], "rb");
    if (!file || fread(x, 1, bytes, file) != bytes) return perror(argv[2]), 2;
    fclose(file);
    status = gossamer_run(net, 1, inputs, outputs, 1, message);
    for (size_t i = 0; !status && i < gossamer_elements(&out, 1); i++) printf("%.9g\n", y[i]);
    free(x), free(y);
  }
  if (status) fprintf(stderr, "%s: %s\n", gossamer_status_name(status), message);
  gossamer_free(net);
  return (int)status;
}
