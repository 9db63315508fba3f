/* What --device NAME, and the options that stand for it, can create. */
#include <stddef.h>
#include "vmm/vm.h"

/* To add a device, add its line: foo stands for foo_class, defined in the device's own file. */
#define DEVICES(X)                                                                                 \
	X(balloon)                                                                                 \
	X(blk)                                                                                     \
	X(console)                                                                                 \
	X(net)                                                                                     \
	X(rng)

#define DECLARE(name) extern const struct device_class name##_class;
#define LIST(name)    &name##_class,

DEVICES(DECLARE)

const struct device_class *const device_classes[] = { DEVICES(LIST) NULL };
