# _cpu: the attention kernels' one source compiled once per instruction set, chosen among at run
# time. Flags beyond the compiler's default reach nothing but these objects: never -march=native.
nanobind_add_module(_cpu STABLE_ABI NB_STATIC
  csrc/common/module_cpu.cc
  csrc/attention/ffi_cpu.cc
  csrc/attention/cpu/choose.cc
  csrc/attention/cpu/mask.cc
  csrc/attention/cpu/schedule.cc
  csrc/attention/cpu/sequences.cc)
target_include_directories(_cpu PRIVATE csrc ${XLA_FFI_INCLUDE})

function(jax_flash_cpu_kernels isa)
  add_library(cpu_${isa} OBJECT csrc/attention/cpu/isa/kernels.cc)
  target_include_directories(cpu_${isa} PRIVATE csrc)
  target_compile_definitions(cpu_${isa} PRIVATE JAX_FLASH_ISA=${isa})
  target_compile_options(cpu_${isa} PRIVATE -O3 -ffp-contract=fast -Wno-psabi ${ARGN})
  target_link_libraries(_cpu PRIVATE cpu_${isa})
endfunction()

jax_flash_cpu_kernels(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  jax_flash_cpu_kernels(avx2 ${avx2})
  jax_flash_cpu_kernels(avx512 ${avx512})
  jax_flash_cpu_kernels(avx512_bf16 ${avx512} -mavx512bf16)
endif()
install(TARGETS _cpu LIBRARY DESTINATION jax_flash)
