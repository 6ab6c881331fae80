// What an extension module gives Python: registrations(), its handlers by target name.
#pragma once

#include <nanobind/nanobind.h>

#include "common/handler.h"

namespace jax_flash {

inline void define_registrations(nanobind::module_& module) {
  module.def("registrations", [] {
    nanobind::dict table;
    for (const auto& [target, handler] : handlers()) {
      table[target.c_str()] = nanobind::capsule(reinterpret_cast<void*>(handler));
    }
    return table;
  });
}

}  // namespace jax_flash
