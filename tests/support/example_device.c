/* virtio-upper: gives back every text in capitals. The README's worked example, compiled and tested here. */
#include <ctype.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/opts.h"
#include "vmm/virtio.h"
#include "vmm/vm.h"

struct upper {
	struct virtio v;
};

static void upper_notify(struct virtio *v, struct virtq *q)
{
	VIRTQ_CHAIN(c);

	ON_LOOP(v->home);
	while (virtq_pop(q, &c) > 0) {
		uint32_t written = 0;
		uint8_t ch;

		while (c.in.len && IOV_GET(&c.out, &ch)) {
			ch = (uint8_t)toupper(ch);
			written += (uint32_t)iov_write(&c.in, &ch, 1);
		}
		virtq_push(q, c.head, written);
	}
}

static void upper_free(struct virtio *v)
{
	free(container_of(v, struct upper, v));
}

static const struct virtio_ops upper_ops = {
	.name = "upper",
	.id = 63,               /* not assigned in virtio 1.2, 5 */
	.notify = upper_notify,
	.free = upper_free,
};

static int upper_create(struct vm *vm, struct opts *o, struct error *err)
{
	struct upper *u;
	int r = opts_end(o, err);       /* it takes no keys */

	if (r)
		return r;
	u = calloc(1, sizeof(*u));
	if (!u)
		return error_errno(err, ENOMEM, "upper");
	virtio_init(&u->v, &upper_ops, 0, 0);
	virtio_add_queue(&u->v, 64);
	r = vm_add_virtio(vm, &u->v, err);
	if (r)
		virtio_free(&u->v);
	return r;
}

const struct device_class upper_class = { .name = "upper", .help = "text to capitals; no keys",
	.create = upper_create };
