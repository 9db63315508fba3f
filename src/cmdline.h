#ifndef CMDLINE_H
#define CMDLINE_H
/* What a Linux kernel needs to be told and the user did not say: console, root, virtio-mmio devices. */
#include <stdbool.h>
struct error;
struct vm;

/* Sets vm->boot.cmdline. Other kernels get the user's words alone. Main thread, once the kernel is recognised. */
int cmdline_complete(struct vm *vm, struct error *err);
/* The kernel loaded is Linux, by its protocol or its banner. */
bool cmdline_is_linux(const struct vm *vm);
#endif
