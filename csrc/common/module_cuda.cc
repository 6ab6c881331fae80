// The extension module jax_flash._cuda: the table of CUDA handlers, nothing else.
#include <nanobind/nanobind.h>

#include "attention/handlers.h"

namespace nb = nanobind;

namespace {

template <typename Handler>
nb::capsule handler(Handler* symbol) {
  return nb::capsule(reinterpret_cast<void*>(symbol));
}

}  // namespace

NB_MODULE(_cuda, module) {
  module.def("registrations", [] {
    nb::dict table;
    table["jax_flash.attention_forward"] = handler(AttentionForward);
    table["jax_flash.attention_backward"] = handler(AttentionBackward);
    return table;
  });
}
