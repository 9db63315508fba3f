#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"
#include "vmm/virtio.h"
#include "vmm/vm.h"

/*
 * Memory the guest does without (virtio 1.2, 5.5): pages it puts into the balloon, and, with free page
 * reporting, pages it merely does not use at the moment. Both are given back to the host by punching them
 * out of the memfd behind guest RAM; the next touch makes a zero page, so taking pages out of the balloon
 * needs nothing from us.
 *
 * Punching frees host memory page by page, which takes a while for a large range: a worker does it, one
 * chain a queue at a time, and the chain goes back to the driver when it is through.
 *
 * Page numbers are the guest's word: what is not wholly RAM is skipped and counted.
 */
#define BALLOON_ID       5
#define PAGE             4096u
#define PFNS_MAX         4096u          /* of one request; Linux sends up to 256 */
#define F_DEFLATE_ON_OOM 2
#define F_REPORTING      5

enum { INFLATE, DEFLATE, REPORTING };

struct config {                 /* all le32 */
	uint32_t num_pages, actual;
};

/* What a worker gives back: page numbers, or proven buffers of a chain. */
struct job {
	struct balloon *b;
	unsigned qi;
	bool busy, idle;                /* idle: what loop_drain() waits for */
	struct loop_op op;
	struct virtq_chain chain;
	uint32_t pfn[PFNS_MAX];
	unsigned nr_pfns;
	uint64_t freed, skipped;        /* pages, by the worker */
};

struct balloon {
	struct virtio v;
	/* home loop; a busy job's chain, pfn, freed and skipped are the worker's */
	struct job inflate, report;
	bool stopping;
	uint64_t inflated, deflated, reported, skipped; /* pages */
};

static struct balloon *balloon_of(struct virtio *v)
{
	return container_of(v, struct balloon, v);
}

/* ---- on a worker ---- */

/* Give pages [pfn, pfn + n) back where they are RAM; how many were. */
static uint64_t punch(const struct gmem *mem, uint64_t pfn, uint64_t n)
{
	uint64_t off = 0, pages = 0;

	for (unsigned i = 0; i < mem->nr; i++) {
		const struct gmem_region *r = &mem->region[i];
		uint64_t first = r->base / PAGE, end = (r->base + r->size) / PAGE;
		uint64_t from = MAX(pfn, first), to = MIN(pfn + n, end);

		if (from < to && !fallocate(mem->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				(off_t)(off + (from - first) * PAGE), (off_t)((to - from) * PAGE)))
			pages += to - from;
		off += r->size;
	}
	return pages;
}

/* Let a[i] sink to its place in the heap of n. */
static void sift(uint32_t *a, unsigned i, unsigned n)
{
	uint32_t v = a[i];

	for (unsigned child; (child = 2 * i + 1) < n; i = child) {
		if (child + 1 < n && a[child + 1] > a[child])
			child++;
		if (v >= a[child])
			break;
		a[i] = a[child];
	}
	a[i] = v;
}

/* A heap sort: libc's qsort() may ask for the size of the host's memory, which the filter forbids. */
static void sort(uint32_t *a, unsigned n)
{
	for (unsigned i = n / 2; i-- > 0;)
		sift(a, i, n);
	while (n-- > 1) {
		uint32_t most = a[0];

		a[0] = a[n];
		a[n] = most;
		sift(a, 0, n);
	}
}

/* Page numbers come in any order, some perhaps twice: neighbours are given back together. */
static int inflate_work(struct loop_op *op)
{
	struct job *j = container_of(op, struct job, op);
	unsigned i = 0;

	sort(j->pfn, j->nr_pfns);
	while (i < j->nr_pfns) {
		uint64_t first = j->pfn[i], end = first + 1, done;

		while (++i < j->nr_pfns && j->pfn[i] <= end)
			end = (uint64_t)j->pfn[i] + 1;
		done = punch(j->b->v.mem, first, end - first);
		j->freed += done;
		j->skipped += end - first - done;
	}
	return 0;
}

/* A buffer that virtq_pop() has proven lies in one region; only its whole pages count. */
static int report_work(struct loop_op *op)
{
	struct job *j = container_of(op, struct job, op);
	const struct gmem *mem = j->b->v.mem;

	for (unsigned i = 0; i < j->chain.in.cnt; i++) {
		const uint8_t *p = j->chain.in.iov[i].iov_base;
		size_t len = j->chain.in.iov[i].iov_len;

		for (unsigned k = 0; k < mem->nr; k++) {
			const struct gmem_region *r = &mem->region[k];
			uint64_t at, first, end;

			if (p < r->host || p >= r->host + r->size)
				continue;
			at = r->base + (uint64_t)(p - r->host);
			first = (at + PAGE - 1) / PAGE;
			end = (at + len) / PAGE;
			if (first < end)
				j->freed += punch(mem, first, end - first);
		}
	}
	return 0;
}

/* ---- home loop ---- */

static void serve(struct job *j);

static void job_done(struct loop_op *op, int res)
{
	struct job *j = container_of(op, struct job, op);
	struct balloon *b = j->b;

	(void)res;
	j->busy = false;
	j->idle = true;
	*(j == &b->inflate ? &b->inflated : &b->reported) += j->freed;
	b->skipped += j->skipped;
	virtq_push(b->v.vq[j->qi], j->chain.head, 0);
	serve(j);
}

static void take_pfns(struct job *j)
{
	uint32_t pfn;

	j->nr_pfns = 0;
	while (j->nr_pfns < PFNS_MAX && IOV_GET(&j->chain.out, &pfn))
		j->pfn[j->nr_pfns++] = le32toh(pfn);
	j->skipped = j->chain.out.len / sizeof(pfn);
}

/* Start on the queue's next chain, if there is one and the worker is free. */
static void serve(struct job *j)
{
	struct virtio *v = &j->b->v;

	if (j->busy || j->b->stopping || !v->vq[j->qi] ||
		virtq_pop(v->vq[j->qi], &j->chain) <= 0)
		return;
	j->freed = j->skipped = 0;
	if (j->qi == INFLATE)
		take_pfns(j);
	j->busy = true;
	j->idle = false;
	j->op.kind = OP_WORK;
	j->op.work = j->qi == INFLATE ? inflate_work : report_work;
	j->op.done = job_done;
	loop_submit(v->home, &j->op);
}

static void deflate(struct balloon *b, struct virtq *q)
{
	VIRTQ_CHAIN(c);

	while (virtq_pop(q, &c) > 0) {
		b->deflated += c.out.len / sizeof(uint32_t);
		virtq_push(q, c.head, 0);
	}
}

static void balloon_notify(struct virtio *v, struct virtq *q)
{
	struct balloon *b = balloon_of(v);

	ON_LOOP(v->home);
	if (virtq_index(q) == DEFLATE)
		deflate(b, q);
	else
		serve(virtq_index(q) == INFLATE ? &b->inflate : &b->report);
}

static void balloon_stop(struct virtio *v)
{
	struct balloon *b = balloon_of(v);

	ON_LOOP(v->home);
	b->stopping = true;
	if (b->inflate.busy)
		loop_drain(v->home, &b->inflate.idle);
	if (b->report.busy)
		loop_drain(v->home, &b->report.idle);
	b->stopping = false;
}

/* The driver says how many pages are in the balloon by now. */
static void balloon_config_write(struct virtio *v, unsigned off, unsigned size, uint64_t val)
{
	ON_LOOP(v->home);
	if (off >= offsetof(struct config, actual))
		virtio_config_set(v, off, &val, size);
}

static void balloon_facts(struct virtio *v, struct facts *f)
{
	struct balloon *b = balloon_of(v);

	facts_u64(f, "target_pages", virtio_config_read(v, offsetof(struct config, num_pages), 4));
	facts_u64(f, "actual_pages", virtio_config_read(v, offsetof(struct config, actual), 4));
	facts_u64(f, "inflated_pages", b->inflated);
	facts_u64(f, "deflated_pages", b->deflated);
	facts_u64(f, "reported_pages", b->reported);
	facts_u64(f, "skipped_pages", b->skipped);
}

static void balloon_free(struct virtio *v)
{
	free(balloon_of(v));
}

static const struct virtio_ops balloon_ops = {
	.name = "balloon",
	.id = BALLOON_ID,
	.stop = balloon_stop,
	.notify = balloon_notify,
	.config_write = balloon_config_write,
	.facts = balloon_facts,
	.free = balloon_free,
};

static int balloon_create(struct vm *vm, struct opts *o, struct error *err)
{
	uint64_t ram = gmem_total(&vm->mem), target = ram;
	struct config config = { 0 };
	struct balloon *b;
	int r;

	r = opts_size(o, "target", 0, ram, &target, err);
	if (!r)
		r = opts_end(o, err);
	if (r)
		return r;
	b = calloc(1, sizeof(*b));
	if (!b)
		return error_errno(err, ENOMEM, "balloon");
	virtio_init(&b->v, &balloon_ops, 1ull << F_DEFLATE_ON_OOM | 1ull << F_REPORTING,
		sizeof(config));
	/* Linux numbers the queues without gaps: reporting follows where statistics would be. */
	virtio_add_queue(&b->v, 64);
	virtio_add_queue(&b->v, 64);
	virtio_add_queue(&b->v, 64);
	config.num_pages = htole32((uint32_t)MIN((ram - target) / PAGE, UINT32_MAX));
	virtio_config_set(&b->v, 0, &config, sizeof(config));
	b->inflate.b = b->report.b = b;
	b->inflate.qi = INFLATE;
	b->report.qi = REPORTING;
	r = vm_add_virtio(vm, &b->v, err);
	if (r)
		virtio_free(&b->v);
	return r;
}

const struct device_class balloon_class = {
	.name = "balloon",
	.help = "target=SIZE: memory to leave the guest (all); pages it reports free go back to the host",
	.create = balloon_create,
};
