#include "vmm/virtio.h"
#include "vmm/facts.h"

void virtio_describe(struct virtio *v, struct facts *f)
{
	facts_str(f, "name", v->name);
	facts_str(f, "class", v->ops->name);
	facts_u64(f, "status", virtio_status(v));
	facts_bool(f, "needs_reset", v->broken);
	facts_u64(f, "kicks", v->kicks);
	facts_u64(f, "interrupts", v->irqs);
	facts_u64(f, "ignored_accesses", v->ignored);
	if (v->ops->facts)
		v->ops->facts(v, f);
}
