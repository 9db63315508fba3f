#include "devices/pc.h"
#include <stdlib.h>
#include "vmm/error.h"

static void pc_device_free(void *dev)
{
	struct pc_device *d = dev;

	for (unsigned i = 0; i < PC_RANGES; i++)
		bus_del(&d->vm->pio, &d->region[i]);
	if (d->class->done)
		d->class->done(d);
	pthread_mutex_destroy(&d->lock);
	free(d);
}

int pc_device_add(struct vm *vm, struct pc_device *d, const struct pc_class *class, uint16_t base,
	struct error *err)
{
	int r = 0;

	d->vm = vm;
	d->class = class;
	pthread_mutex_init(&d->lock, NULL);
	if (class->reset)
		class->reset(d);
	for (unsigned i = 0; i < PC_RANGES && class->range[i].size && !r; i++) {
		d->region[i] = (struct bus_region){
			.name = class->name,
			.base = class->range[i].port ? class->range[i].port : base,
			.size = class->range[i].size,
			.ops = class->range[i].ops,
			.dev = d,
			.lock = class->lockless ? NULL : &d->lock,
		};
		r = bus_add(&vm->pio, &d->region[i], err);
	}
	if (!r)
		r = vm_add_device(vm, class->name, d, class->reset, class->describe, pc_device_free,
			err);
	if (r)
		pc_device_free(d);
	return r;
}
