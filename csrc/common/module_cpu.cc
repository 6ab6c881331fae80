// The extension module jax_flash._cpu: the table of CPU handlers, nothing else.
#include "common/module.h"

NB_MODULE(_cpu, module) { jax_flash::define_registrations(module); }
