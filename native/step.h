// A call that is bound to its arrays, as other modules run it: a function and what it is given.
#pragma once
#include <nanobind/nanobind.h>

namespace gossamer {

struct Step {
  bool (*run)(const void* self);  // without the GIL; false: an input that the call refuses
  const void* self;
};

constexpr const char* kStep = "gossamer.step";

// The step of an object whose `run() const` is bool; the object must stay alive and where it is.
template <class T>
nanobind::capsule step_of(const T& object) {
  auto* made = new Step{[](const void* self) { return static_cast<const T*>(self)->run(); }, &object};
  return nanobind::capsule(made, kStep, [](void* p) noexcept { delete static_cast<Step*>(p); });
}

// `run`, called from Python, and `step`.
template <class C>
void define_step(C& c) {
  using T = typename C::Type;
  c.def("__call__", &T::run, nanobind::call_guard<nanobind::gil_scoped_release>(),
        "Compute; False where an input is refused.");
  c.def_prop_ro("step", &step_of<T>, "For `small.Chain`.");
}

}  // namespace gossamer
