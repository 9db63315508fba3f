#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/random.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"
#include "vmm/virtio.h"
#include "vmm/vm.h"

/*
 * Entropy (virtio 1.2, 5.4), from getrandom(2). A request gets at most REQUEST_MAX bytes whatever room it
 * offers, and all requests together BURST bytes a PERIOD: the I/O loop has other work. A device that ran
 * out leaves the ring alone until the period ends.
 */
#define RNG_ID      4
#define REQUEST_MAX (64u << 10)
#define BURST       (1u << 20)
#define PERIOD_NS   100000000ull

struct rng {
	struct virtio v;
	/* home loop */
	struct loop_timer refill;
	uint64_t period_ns;     /* when the current period began */
	uint32_t left;          /* bytes of it */
	uint64_t bytes, pauses;
};

static struct rng *rng_of(struct virtio *v)
{
	return container_of(v, struct rng, v);
}

/* Straight into guest RAM: no copy of the guest's secrets stays here. */
static uint32_t fill(const struct iov_view *in, uint32_t max)
{
	uint32_t done = 0;

	for (unsigned i = 0; i < in->cnt && done < max; i++) {
		uint8_t *p = in->iov[i].iov_base;
		size_t len = MIN(in->iov[i].iov_len, max - done);

		while (len) {
			ssize_t n = getrandom(p, len, 0);

			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				return done;
			p += n;
			len -= (size_t)n;
			done += (uint32_t)n;
		}
	}
	return done;
}

static void serve(struct rng *r)
{
	struct virtq *q = r->v.vq[0];
	uint64_t now = loop_now();
	VIRTQ_CHAIN(c);

	if (!q)
		return;
	if (now - r->period_ns >= PERIOD_NS) {
		r->period_ns = now;
		r->left = BURST;
	}
	while (r->left) {
		uint32_t n;

		if (virtq_pop(q, &c) <= 0)
			return;
		n = fill(&c.in, MIN(REQUEST_MAX, r->left));
		r->left -= n;
		r->bytes += n;
		virtq_push(q, c.head, n);
	}
	r->pauses++;
	loop_set_timer(r->v.home, &r->refill, r->period_ns + PERIOD_NS);
}

static void refilled(struct loop_timer *t)
{
	serve(container_of(t, struct rng, refill));
}

static void rng_notify(struct virtio *v, struct virtq *q)
{
	(void)q;
	ON_LOOP(v->home);
	serve(rng_of(v));
}

static void rng_stop(struct virtio *v)
{
	ON_LOOP(v->home);
	loop_del_timer(v->home, &rng_of(v)->refill);
}

static void rng_facts(struct virtio *v, struct facts *f)
{
	facts_u64(f, "bytes", rng_of(v)->bytes);
	facts_u64(f, "pauses", rng_of(v)->pauses);
}

static void rng_free(struct virtio *v)
{
	free(rng_of(v));
}

static const struct virtio_ops rng_ops = {
	.name = "rng",
	.id = RNG_ID,
	.stop = rng_stop,
	.notify = rng_notify,
	.facts = rng_facts,
	.free = rng_free,
};

static int rng_create(struct vm *vm, struct opts *o, struct error *err)
{
	struct rng *r;
	int ret = opts_end(o, err);

	if (ret)
		return ret;
	r = calloc(1, sizeof(*r));
	if (!r)
		return error_errno(err, ENOMEM, "rng");
	virtio_init(&r->v, &rng_ops, 0, 0);
	virtio_add_queue(&r->v, 64);
	r->refill.fn = refilled;
	ret = vm_add_virtio(vm, &r->v, err);
	if (ret)
		virtio_free(&r->v);
	return ret;
}

const struct device_class rng_class = {
	.name = "rng",
	.help = "random numbers from the host; no keys",
	.create = rng_create,
};
