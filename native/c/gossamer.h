/* Runs the files of `gossamer compile --to net.plan` from C: no Python, no other library.
 *
 *     gossamer_network *net;
 *     if (gossamer_load("net.plan", &net, message)) ...
 *     gossamer_run(net, 1, inputs, outputs, 1, message);
 *     gossamer_free(net);
 *
 * A network does not change after it was loaded: any number of threads may run it at once. Nothing
 * is kept outside of it. Build: docs/deploy.md. */
#ifndef GOSSAMER_H
#define GOSSAMER_H
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define GOSSAMER_API
#else
#define GOSSAMER_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header. A library that reports another one (gossamer_abi) has other functions. */
#define GOSSAMER_ABI 1
/* Room for a message, in bytes. Every `message` here is NULL or has this much. */
#define GOSSAMER_MESSAGE 256
#define GOSSAMER_MOST_DIMENSIONS 16

typedef enum {
  GOSSAMER_OK = 0,
  GOSSAMER_FILE = 1,        /* the file cannot be read */
  GOSSAMER_FORMAT = 2,      /* it is truncated, damaged, hostile, or of another version */
  GOSSAMER_UNSUPPORTED = 3, /* it needs what this library does not have */
  GOSSAMER_ARGUMENT = 4,    /* an argument is NULL, out of range, or an input is not finite */
  GOSSAMER_MEMORY = 5,      /* there is not enough memory, or it is beyond gossamer_limit */
  GOSSAMER_DIFFERS = 6,     /* the example in the file comes out otherwise here */
  GOSSAMER_INTERNAL = 7     /* a thread could not be started, or a fault of this library */
} gossamer_status;

typedef enum {
  GOSSAMER_FLOAT32 = 0,
  GOSSAMER_INT64 = 1,
  GOSSAMER_INT32 = 2,
  GOSSAMER_BOOL = 3,
  GOSSAMER_FLOAT64 = 4,
  GOSSAMER_UINT8 = 5,
  GOSSAMER_INT8 = 6,
  GOSSAMER_INT16 = 7
} gossamer_dtype;

/* An input or output. A dimension of n >= 0 is a size, one of -k is k times the size of the batch. */
typedef struct {
  gossamer_dtype dtype;
  int32_t rank;
  int64_t shape[GOSSAMER_MOST_DIMENSIONS];
} gossamer_tensor;

typedef struct gossamer_network gossamer_network;

/* Read a file, check its digest and every part's fit, pack its weights, and compute the example that
 * it holds. On success *network is set; else it is NULL and `message` says why. */
GOSSAMER_API gossamer_status gossamer_load(const char *path, gossamer_network **network,
                                           char *message);
/* The same from memory, which is not needed afterwards. */
GOSSAMER_API gossamer_status gossamer_load_bytes(const void *data, size_t size,
                                                 gossamer_network **network, char *message);
/* Free a network that no thread is running; NULL is allowed. */
GOSSAMER_API void gossamer_free(gossamer_network *network);

/* How many tensors it takes and gives, and what each is. */
GOSSAMER_API size_t gossamer_inputs(const gossamer_network *network);
GOSSAMER_API size_t gossamer_outputs(const gossamer_network *network);
GOSSAMER_API gossamer_status gossamer_input(const gossamer_network *network, size_t index,
                                            gossamer_tensor *tensor);
GOSSAMER_API gossamer_status gossamer_output(const gossamer_network *network, size_t index,
                                             gossamer_tensor *tensor);
/* Elements and bytes of a tensor of so many examples; 0 where that does not fit in a size_t. */
GOSSAMER_API size_t gossamer_elements(const gossamer_tensor *tensor, int64_t batch);
GOSSAMER_API size_t gossamer_bytes(const gossamer_tensor *tensor, int64_t batch);

/* Compute `batch` examples (0: nothing is done; where no shape depends on the batch: 1) on at most
 * `threads` threads. inputs[i] and outputs[i] point to C-contiguous arrays, of any alignment that
 * their type allows; results do not depend on the number of threads. Inputs that are NaN or
 * infinite are refused. After an error what the outputs hold is not defined. */
GOSSAMER_API gossamer_status gossamer_run(const gossamer_network *network, int64_t batch,
                                          const void *const *inputs, void *const *outputs,
                                          int threads, char *message);

/* Bytes that one call of so many examples takes between its layers; 0 where it cannot be. */
GOSSAMER_API size_t gossamer_memory(const gossamer_network *network, int64_t batch);
/* The most that it may take (1 GiB unless set); not while another thread runs the network. */
GOSSAMER_API void gossamer_limit(gossamer_network *network, size_t bytes);

/* A status in a word, and GOSSAMER_ABI as it was when the library was built. */
GOSSAMER_API const char *gossamer_status_name(gossamer_status status);
GOSSAMER_API int gossamer_abi(void);

#ifdef __cplusplus
}
#endif
#endif
