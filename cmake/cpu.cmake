# _cpu: one object library per instruction set, chosen among at run time.
nanobind_add_module(_cpu STABLE_ABI NB_STATIC
  csrc/common/module_cpu.cc
  csrc/attention/ffi_cpu.cc)
target_include_directories(_cpu PRIVATE csrc ${XLA_FFI_INCLUDE})
install(TARGETS _cpu LIBRARY DESTINATION jax_flash)
