// The C interface of gossamer.h: plans read, checked and run. The only file to compile (C++17).
#include "gossamer.h"

#include <cerrno>
#include <cstdio>
#include <exception>
#include <system_error>

#include "../quads.h"
#include "../sparse_conv.h"
#include "../sparse_gemv.h"

#define GOSSAMER_BODY "c/parts/bodies.h"
#include "../each_isa.h"
#include "parts/program.h"

using gossamer::c::BadInput;
using gossamer::c::FormatError;
using gossamer::c::Plan;
using gossamer::c::Program;
using gossamer::c::Slot;
using gossamer::c::Unsupported;

struct gossamer_network {
  Program program;
};

namespace {

struct Failure {  // a status that is thrown
  gossamer_status status;
  std::string text;
};

gossamer_status report(gossamer_status status, const char* text, char* message) {
  if (message) std::snprintf(message, GOSSAMER_MESSAGE, "%s", text);
  return status;
}

// f(), and what it throws as a status: no exception leaves the library.
template <class F>
gossamer_status guarded(char* message, F f) noexcept {
  try {
    f();
    return report(GOSSAMER_OK, "", message);
  } catch (const Failure& e) {
    return report(e.status, e.text.c_str(), message);
  } catch (const FormatError& e) {
    return report(GOSSAMER_FORMAT, e.what(), message);
  } catch (const Unsupported& e) {
    return report(GOSSAMER_UNSUPPORTED, e.what(), message);
  } catch (const BadInput& e) {
    return report(GOSSAMER_ARGUMENT, e.what(), message);
  } catch (const std::invalid_argument& e) {  // of a kernel's own checks
    return report(GOSSAMER_FORMAT, e.what(), message);
  } catch (const std::bad_alloc&) {
    return report(GOSSAMER_MEMORY, "not enough memory, or beyond gossamer_limit", message);
  } catch (const std::length_error&) {
    return report(GOSSAMER_MEMORY, "an array is longer than can be", message);
  } catch (const std::exception& e) {
    return report(GOSSAMER_INTERNAL, e.what(), message);
  } catch (...) {
    return report(GOSSAMER_INTERNAL, "an unknown fault", message);
  }
}

[[noreturn]] void argument(const std::string& text) { throw Failure{GOSSAMER_ARGUMENT, text}; }

bool finite(const float* x, int64_t n) {
  bool good = true;
  for (int64_t i = 0; i < n; i++) good &= x[i] - x[i] == 0;
  return good;
}

// The largest difference over the largest magnitude; infinite where one is finite and one is not.
double difference(const Slot& wanted, const std::vector<uint8_t>& got) {
  if (wanted.dtype != GOSSAMER_FLOAT32)
    return wanted.data == got ? 0 : std::numeric_limits<double>::infinity();
  double off = 0, most = 0;
  for (size_t i = 0; i < got.size(); i += 4) {
    float a, b;
    std::memcpy(&a, wanted.data.data() + i, 4);
    std::memcpy(&b, got.data() + i, 4);
    if (std::isfinite(a) != std::isfinite(b)) return std::numeric_limits<double>::infinity();
    if (!std::isfinite(a)) continue;
    off = std::max(off, std::fabs(double(a) - double(b)));
    most = std::max(most, std::fabs(double(a)));
  }
  return most > 0 ? off / most : off;
}

// Compute the example that the file holds; without one, bind the operators at least.
void try_example(const Program& program) {
  const Plan& plan = program.plan();
  const auto &given = plan.probe.given, &wanted = plan.probe.wanted;
  if (given.empty() && wanted.empty()) return program.try_binding();
  if (given.size() != plan.inputs.size() || wanted.size() != plan.outputs.size())
    throw FormatError("an example of another number of tensors");
  int64_t batch = 1;
  const auto fits = [&](const Slot& have, const Slot& want) {
    bool good = have.dtype == want.dtype && have.shape.size() == want.shape.size();
    for (size_t i = 0; good && i < have.shape.size(); i++) {
      if (want.shape[i] < 0) batch = have.shape[i] / -want.shape[i];
      good = have.shape[i] == (want.shape[i] < 0 ? -want.shape[i] * batch : want.shape[i]);
    }
    if (!good) throw FormatError("an example of another shape or type");
  };
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  std::vector<std::vector<uint8_t>> got;
  for (size_t i = 0; i < given.size(); i++) {
    fits(given[i], plan.slots[size_t(plan.inputs[i])]);
    inputs.push_back(given[i].data.data());
  }
  for (size_t i = 0; i < given.size(); i++)  // of one batch
    if (given[i].shape != gossamer::c::resolved(plan.slots[size_t(plan.inputs[i])].shape, batch))
      throw FormatError("an example of several batches");
  for (size_t i = 0; i < wanted.size(); i++) {
    const auto& kind = plan.slots[size_t(plan.outputs[i])];
    if (wanted[i].dtype != kind.dtype ||
        wanted[i].shape != gossamer::c::resolved(kind.shape, batch))
      throw FormatError("an example of another shape or type");
    got.emplace_back(wanted[i].data.size());
  }
  for (auto& g : got) outputs.push_back(g.data());
  if (batch) program.run(batch, inputs.data(), outputs.data(), 1);
  const double allowed = plan.integers ? 0.02 : 1e-4;
  for (size_t i = 0; i < got.size(); i++)
    if (!(difference(wanted[i], got[i]) <= allowed))
      throw Failure{GOSSAMER_DIFFERS, "the example of the file comes out otherwise here"};
}

std::vector<uint8_t> contents(const char* path) {
  struct Close {
    void operator()(std::FILE* f) const { std::fclose(f); }
  };
  const auto fail = [&](int error) {
    const std::string why = error ? std::generic_category().message(error) : "cannot be read";
    throw Failure{GOSSAMER_FILE, std::string(path).substr(0, 150) + ": " + why};
  };
  errno = 0;
  std::unique_ptr<std::FILE, Close> file(std::fopen(path, "rb"));
  if (!file) fail(errno);
  std::vector<uint8_t> data;
  for (size_t n = 1 << 16, got = n; got == n;) {
    const size_t at = data.size();
    n = std::max<size_t>(n, at / 2);
    data.resize(at + n);
    got = std::fread(data.data() + at, 1, n, file.get());
    data.resize(at + got);
  }
  if (std::ferror(file.get())) fail(errno);
  return data;
}

gossamer_status described(const gossamer_network* network, bool outputs, size_t index,
                          gossamer_tensor* to) {
  if (!network || !to) return GOSSAMER_ARGUMENT;
  const Plan& plan = network->program.plan();
  const auto& all = outputs ? plan.outputs : plan.inputs;
  if (index >= all.size()) return GOSSAMER_ARGUMENT;
  const Slot& s = plan.slots[size_t(all[index])];
  *to = {};
  to->dtype = gossamer_dtype(s.dtype), to->rank = int32_t(s.shape.size());
  std::copy(s.shape.begin(), s.shape.end(), to->shape);
  return GOSSAMER_OK;
}

}  // namespace

extern "C" {

gossamer_status gossamer_load_bytes(const void* data, size_t size, gossamer_network** network,
                                    char* message) {
  if (network) *network = nullptr;
  return guarded(message, [&] {
    if (!data || !network) argument("data or network is NULL");
    auto plan = gossamer::c::PlanReader(static_cast<const uint8_t*>(data), size).read();
    std::unique_ptr<gossamer_network> made(new gossamer_network{Program(std::move(plan))});
    try_example(made->program);
    *network = made.release();
  });
}

gossamer_status gossamer_load(const char* path, gossamer_network** network, char* message) {
  if (network) *network = nullptr;
  std::vector<uint8_t> data;
  const gossamer_status read = guarded(message, [&] {
    if (!path || !network) argument("path or network is NULL");
    data = contents(path);
  });
  return read ? read : gossamer_load_bytes(data.data(), data.size(), network, message);
}

void gossamer_free(gossamer_network* network) { delete network; }

size_t gossamer_inputs(const gossamer_network* network) {
  return network ? network->program.plan().inputs.size() : 0;
}
size_t gossamer_outputs(const gossamer_network* network) {
  return network ? network->program.plan().outputs.size() : 0;
}
gossamer_status gossamer_input(const gossamer_network* network, size_t index,
                               gossamer_tensor* tensor) {
  return described(network, false, index, tensor);
}
gossamer_status gossamer_output(const gossamer_network* network, size_t index,
                                gossamer_tensor* tensor) {
  return described(network, true, index, tensor);
}

size_t gossamer_elements(const gossamer_tensor* tensor, int64_t batch) {
  if (!tensor || batch < 0 || tensor->rank < 0 || tensor->rank > GOSSAMER_MOST_DIMENSIONS) return 0;
  size_t result = 0;
  guarded(nullptr, [&] {
    result = size_t(gossamer::c::elements(
        gossamer::c::Shape(tensor->shape, tensor->shape + tensor->rank), batch));
  });
  return result;
}
size_t gossamer_bytes(const gossamer_tensor* tensor, int64_t batch) {
  if (!tensor || tensor->dtype < GOSSAMER_FLOAT32 || tensor->dtype > GOSSAMER_INT16) return 0;
  const size_t count = gossamer_elements(tensor, batch), each = gossamer::c::kTypes[tensor->dtype].bytes;
  return count > SIZE_MAX / each ? 0 : count * each;
}

gossamer_status gossamer_run(const gossamer_network* network, int64_t batch,
                             const void* const* inputs, void* const* outputs, int threads,
                             char* message) {
  return guarded(message, [&] {
    if (!network || !inputs || !outputs) argument("network, inputs or outputs is NULL");
    const Plan& plan = network->program.plan();
    if (batch < 0) argument("batch is below 0");
    if (!plan.free() && batch != 1) argument("batch must be 1: this network's shapes are fixed");
    if (threads < 1 || threads > 1024) argument("threads must be 1 to 1024");
    if (!batch) return;
    for (size_t i = 0; i < plan.inputs.size(); i++) {
      const Slot& s = plan.slots[size_t(plan.inputs[i])];
      const int64_t n = gossamer::c::elements(s.shape, batch);
      if (!inputs[i] && n) argument("input " + std::to_string(i) + " is NULL");
      if (s.dtype == GOSSAMER_FLOAT32 && !finite(static_cast<const float*>(inputs[i]), n))
        argument("input " + std::to_string(i) + " is NaN or infinite somewhere");
    }
    for (size_t i = 0; i < plan.outputs.size(); i++)
      if (!outputs[i]) argument("output " + std::to_string(i) + " is NULL");
    network->program.run(batch, inputs, outputs, size_t(threads));
  });
}

size_t gossamer_memory(const gossamer_network* network, int64_t batch) {
  size_t result = 0;
  if (network && batch > 0)
    guarded(nullptr, [&] { result = network->program.memory(batch); });
  return result;
}

void gossamer_limit(gossamer_network* network, size_t bytes) {
  if (network) network->program.bound_memory(bytes);
}

const char* gossamer_status_name(gossamer_status status) {
  switch (status) {
    case GOSSAMER_OK: return "ok";
    case GOSSAMER_FILE: return "file";
    case GOSSAMER_FORMAT: return "format";
    case GOSSAMER_UNSUPPORTED: return "unsupported";
    case GOSSAMER_ARGUMENT: return "argument";
    case GOSSAMER_MEMORY: return "memory";
    case GOSSAMER_DIFFERS: return "differs";
    case GOSSAMER_INTERNAL: return "internal";
  }
  return "unknown";
}

int gossamer_abi(void) { return GOSSAMER_ABI; }

}  // extern "C"
