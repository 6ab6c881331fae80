# _cuda: built where an nvcc is found; one object library per architecture.
#
#   JAX_FLASH_CUDA=AUTO|ON|OFF       AUTO builds _cuda if there is an nvcc, ON insists on it
#   JAX_FLASH_NVCC_FROM_WHEELS=ON    takes nvcc from the wheels nvidia-cuda-nvcc, nvidia-nvvm,
#                                    nvidia-cuda-crt, nvidia-cuda-cccl and nvidia-cuda-runtime of
#                                    the Python that builds
set(JAX_FLASH_CUDA "AUTO" CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE JAX_FLASH_CUDA PROPERTY STRINGS AUTO ON OFF)
option(JAX_FLASH_NVCC_FROM_WHEELS "Use nvcc from Python's nvidia-* wheels" OFF)

if(NOT JAX_FLASH_CUDA)  # OFF, in all its spellings
  return()
endif()

if(JAX_FLASH_NVCC_FROM_WHEELS)
  # CUDA 13's wheels share one folder, nvidia/cu13, laid out as a toolkit but for the name of lib64.
  execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/toolkit_from_wheels.py
                          ${CMAKE_BINARY_DIR}/cuda-toolkit
                  OUTPUT_VARIABLE JAX_FLASH_TOOLKIT OUTPUT_STRIP_TRAILING_WHITESPACE
                  COMMAND_ERROR_IS_FATAL ANY)
  set(CMAKE_CUDA_COMPILER ${JAX_FLASH_TOOLKIT}/bin/nvcc)
  set(CUDAToolkit_ROOT ${JAX_FLASH_TOOLKIT})
elseif(NOT CMAKE_CUDA_COMPILER)
  find_program(JAX_FLASH_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
               PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(JAX_FLASH_NVCC)
    set(CMAKE_CUDA_COMPILER ${JAX_FLASH_NVCC})
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  if(JAX_FLASH_CUDA STREQUAL "AUTO")
    message(STATUS "jax_flash: no nvcc found, building for the CPU alone")
    return()
  endif()
  message(FATAL_ERROR "jax_flash: JAX_FLASH_CUDA=ON: expected an nvcc on PATH, in CUDA_HOME or in "
                      "/usr/local/cuda (or JAX_FLASH_NVCC_FROM_WHEELS=ON), found none")
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF)  # each object library names its own
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
find_package(CUDAToolkit 12.5 REQUIRED)  # cudaGetDriverEntryPointByVersion
message(STATUS "jax_flash: CUDA kernels with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

# The kernels of one architecture, a part of `module`: sources... compiled with the -gencode options
# given. A spill, a stack frame or a serialised wgmma in any of them fails the build
# (check_ptxas.py).
function(jax_flash_kernels name module)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "GENCODE;SOURCES")
  add_library(${name} OBJECT ${arg_SOURCES})
  target_include_directories(${name} PRIVATE csrc)
  set(flags -Xptxas -v,--warn-on-spills -diag-suppress 177)
  foreach(gencode IN LISTS arg_GENCODE)
    list(APPEND flags "SHELL:-gencode ${gencode}")
  endforeach()
  target_compile_options(${name} PRIVATE ${flags})
  set_target_properties(${name} PROPERTIES CUDA_COMPILER_LAUNCHER
    "${Python_EXECUTABLE};${PROJECT_SOURCE_DIR}/cmake/check_ptxas.py")
  target_sources(${module} PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

function(jax_flash_cuda_module name)
  nanobind_add_module(${name} STABLE_ABI NB_STATIC ${ARGN})
  target_include_directories(${name} PRIVATE csrc ${XLA_FFI_INCLUDE})
  target_link_libraries(${name} PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
  # cudart stays private: JAX brings its own. Nothing links libcuda: _cuda imports without a driver.
  target_link_options(${name} PRIVATE -Wl,--exclude-libs,ALL)
  set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX CUDA_RUNTIME_LIBRARY None)
  install(TARGETS ${name} LIBRARY DESTINATION jax_flash)
endfunction()

# Every folder of csrc with an ffi_cuda.cc is an operator: its handlers (and host code), its kernels
# for any GPU, its kernels for sm_90a.
set(JAX_FLASH_OPERATORS "*" CACHE STRING
    "Which operators get CUDA kernels (a glob of folders of csrc): one alone builds fast")
mark_as_advanced(JAX_FLASH_OPERATORS)
set(operator csrc/${JAX_FLASH_OPERATORS})
file(GLOB cuda_handlers CONFIGURE_DEPENDS ${operator}/ffi_cuda.cc ${operator}/cuda/*.cc)
jax_flash_cuda_module(_cuda csrc/common/module_cuda.cc ${cuda_handlers})

# sm_80 is the complete implementation. Its machine code serves Ampere and Ada; Hopper gets its own
# from the same PTX, since compiling it at the first call would take tens of seconds; newer GPUs
# compile the PTX.
file(GLOB sm80_sources CONFIGURE_DEPENDS
  ${operator}/cuda/*.cu ${operator}/cuda/instances/*.cu)
if(sm80_sources)
  jax_flash_kernels(sm80 _cuda
    GENCODE "arch=compute_80,code=[sm_80,compute_80]" "arch=compute_80,code=sm_90"
    SOURCES ${sm80_sources})
endif()

# sm_90a: kernels on TMA and wgmma, which only that architecture assembles.
file(GLOB sm90_sources CONFIGURE_DEPENDS ${operator}/cuda/instances/sm90/*.cu)
if(sm90_sources)
  jax_flash_kernels(sm90 _cuda
    GENCODE "arch=compute_90a,code=sm_90a" SOURCES ${sm90_sources})
endif()

# _cuda_testing runs each instruction of csrc/ptx alone, for tests/test_ptx.py; not in a wheel.
if(NOT SKBUILD_STATE STREQUAL "wheel")
  jax_flash_cuda_module(_cuda_testing csrc/testing/ptx/ffi.cc)
  file(GLOB testing_sources CONFIGURE_DEPENDS csrc/testing/ptx/*.cu)
  jax_flash_kernels(testing _cuda_testing
    GENCODE "arch=compute_90a,code=sm_90a"
    SOURCES ${testing_sources})
endif()
