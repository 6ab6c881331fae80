// The extension module jax_flash._cuda: the table of CUDA handlers, nothing else.
#include "common/module.h"

NB_MODULE(_cuda, module) { jax_flash::define_registrations(module); }
