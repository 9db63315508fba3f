#include "mock_driver.h"
#include <check.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "devices/virtio/transport.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/opts.h"
#include "vmm/vm.h"

#define MMIO_BASE  0xd0000000ull
#define FIRST_GSI  5
#define RING_ALIGN 4096

struct mock_queue {
	struct vring ring;
	gpa_t base;
	uint16_t last_used;
	uint16_t nr[VIRTQ_MAX];         /* descriptors of the chain at this head, 0: free */
	bool taken[VIRTQ_MAX];
};

struct mock {
	struct vm vm;
	gpa_t next;                     /* allocator */
	uint64_t accepted;
	bool indirect;
	uint32_t isr;                   /* seen and acknowledged, not yet asked for */
	struct mock_queue q[VIRTIO_QUEUES];
};

/* The fake machine's: weak, so that a test that links all of src/vm.c gets the real one. */
__attribute__((weak)) int vm_add_virtio(struct vm *vm, struct virtio *v, struct error *err)
{
	int r;

	snprintf(v->name, sizeof(v->name), "%s%u", v->ops->name, vm->nr_virtio);
	r = virtio_mmio_new(vm, v, MMIO_BASE + vm->nr_virtio * 0x1000ull,
		FIRST_GSI + vm->nr_virtio, err);

	if (!r)
		vm->virtio[vm->nr_virtio++] = v;
	return r;
}

struct mock *mock_new(enum loop_engine engine)
{
	static const struct vm_config cfg = { .machine = MACHINE_MICROVM };
	struct gmem_region ram = { .base = 0, .size = MOCK_RAM };
	struct mock *m = calloc(1, sizeof(*m));
	struct error err;

	ck_assert_ptr_nonnull(m);
	m->vm.cfg = &cfg;
	m->vm.kvm_fd = m->vm.vm_fd = m->vm.wake_fd = -1;
	pthread_mutex_init(&m->vm.stop_lock, NULL);
	ck_assert_msg(!gmem_init(&m->vm.mem, &ram, 1, false, &err), "%s", err.msg);
	bus_init(&m->vm.pio);
	bus_init(&m->vm.mmio);
	ck_assert_int_eq(irqchip_init(&m->vm.irqs, -1, &err), 0);
	m->vm.io = loop_new("io/0", engine, 50, &err);
	ck_assert_msg(m->vm.io != NULL, "%s", err.msg);
	m->next = 0x1000;
	return m;
}

void mock_free(struct mock *m)
{
	for (unsigned i = 0; i < m->vm.nr_virtio; i++)
		virtio_free(m->vm.virtio[i]);
	loop_free(m->vm.io);
	irqchip_done(&m->vm.irqs);
	bus_done(&m->vm.pio);
	bus_done(&m->vm.mmio);
	gmem_done(&m->vm.mem);
	pthread_mutex_destroy(&m->vm.stop_lock);
	free(m);
}

struct vm *mock_vm(struct mock *m)
{
	return &m->vm;
}

int mock_try_create(struct mock *m, const struct device_class *c, const char *args, struct error *err)
{
	struct opts *o = NULL;
	int r = opts_parse(&o, "--device", args, c->implied, err);

	if (!r)
		r = c->create(&m->vm, o, err);
	opts_free(o);
	return r;
}

struct virtio *mock_create(struct mock *m, const struct device_class *c, const char *args)
{
	struct error err = { 0 };

	ck_assert_msg(!mock_try_create(m, c, args, &err), "%s", err.msg);
	return mock_device(m);
}

struct virtio *mock_device(struct mock *m)
{
	ck_assert_uint_ge(m->vm.nr_virtio, 1);
	return m->vm.virtio[0];
}

gpa_t mock_alloc(struct mock *m, uint32_t len)
{
	uint32_t align = len >= 4096 ? 4096 : 64;
	gpa_t at = (m->next + align - 1) & ~(gpa_t)(align - 1);

	ck_assert_msg(at <= MOCK_RAM && len <= MOCK_RAM - at, "mock RAM is used up");
	m->next = at + len;
	memset(mock_at(m, at, len), 0, len);
	return at;
}

void *mock_at(struct mock *m, gpa_t gpa, uint32_t len)
{
	void *p = gmem_at(&m->vm.mem, gpa, len);

	ck_assert_ptr_nonnull(p);
	return p;
}

/* The first device's registers: its region lies lowest on the bus. */
static uint64_t regs(struct mock *m)
{
	ck_assert_uint_ge(m->vm.mmio.nr, 1);
	return m->vm.mmio.region[0]->base;
}

uint32_t mock_read(struct mock *m, unsigned reg)
{
	uint64_t val;

	ck_assert(bus_read(&m->vm.mmio, regs(m) + reg, 4, &val));
	return (uint32_t)val;
}

void mock_write(struct mock *m, unsigned reg, uint32_t val)
{
	ck_assert(bus_write(&m->vm.mmio, regs(m) + reg, 4, val));
}

uint64_t mock_config(struct mock *m, unsigned off, unsigned size)
{
	uint64_t val;

	ck_assert(bus_read(&m->vm.mmio, regs(m) + VIRTIO_MMIO_CONFIG + off, size, &val));
	return val;
}

void mock_config_write(struct mock *m, unsigned off, unsigned size, uint64_t val)
{
	ck_assert(bus_write(&m->vm.mmio, regs(m) + VIRTIO_MMIO_CONFIG + off, size, val));
}

uint64_t mock_offered(struct mock *m)
{
	uint64_t low;

	mock_write(m, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
	low = mock_read(m, VIRTIO_MMIO_DEVICE_FEATURES);
	mock_write(m, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
	return low | (uint64_t)mock_read(m, VIRTIO_MMIO_DEVICE_FEATURES) << 32;
}

uint8_t mock_status(struct mock *m)
{
	return (uint8_t)mock_read(m, VIRTIO_MMIO_STATUS);
}

void mock_reset(struct mock *m)
{
	mock_write(m, VIRTIO_MMIO_STATUS, 0);
	ck_assert_uint_eq(mock_status(m), 0);
}

static void negotiate(struct mock *m, uint64_t want)
{
	m->accepted = mock_offered(m) & (want | 1ull << VIRTIO_F_VERSION_1);
	for (unsigned i = 0; i < 2; i++) {
		mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES_SEL, i);
		mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES, (uint32_t)(m->accepted >> 32 * i));
	}
	mock_write(m, VIRTIO_MMIO_STATUS,
		VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK);
	ck_assert(mock_status(m) & VIRTIO_CONFIG_S_FEATURES_OK);
}

static void set_address(struct mock *m, unsigned reg, const void *host)
{
	gpa_t gpa = (gpa_t)((const uint8_t *)host - m->vm.mem.region[0].host);

	mock_write(m, reg, (uint32_t)gpa);
	mock_write(m, reg + 4, gpa >> 32);
}

/* False: the device has no such queue. Memory is kept from one set-up to the next. */
static bool setup_queue(struct mock *m, unsigned qi)
{
	struct mock_queue *q = &m->q[qi];
	uint32_t n, len;
	gpa_t base = q->base;

	mock_write(m, VIRTIO_MMIO_QUEUE_SEL, qi);
	n = mock_read(m, VIRTIO_MMIO_QUEUE_NUM_MAX);
	if (!n)
		return false;
	len = vring_size(n, RING_ALIGN);
	if (!base)
		base = mock_alloc(m, len);
	memset(q, 0, sizeof(*q));
	q->base = base;
	memset(mock_at(m, base, len), 0, len);
	vring_init(&q->ring, n, mock_at(m, base, len), RING_ALIGN);
	mock_write(m, VIRTIO_MMIO_QUEUE_NUM, n);
	set_address(m, VIRTIO_MMIO_QUEUE_DESC_LOW, q->ring.desc);
	set_address(m, VIRTIO_MMIO_QUEUE_AVAIL_LOW, q->ring.avail);
	set_address(m, VIRTIO_MMIO_QUEUE_USED_LOW, q->ring.used);
	mock_write(m, VIRTIO_MMIO_QUEUE_READY, 1);
	return true;
}

uint64_t mock_setup(struct mock *m, uint64_t want)
{
	mock_reset(m);
	m->isr = 0;
	m->indirect = false;
	negotiate(m, want);
	for (unsigned i = 0; i < VIRTIO_QUEUES && setup_queue(m, i); i++)
		;
	return m->accepted;
}

uint64_t mock_init(struct mock *m, uint64_t want)
{
	mock_setup(m, want);
	mock_write(m, VIRTIO_MMIO_STATUS, mock_status(m) | VIRTIO_CONFIG_S_DRIVER_OK);
	return m->accepted;
}

struct vring *mock_ring(struct mock *m, unsigned qi)
{
	return &m->q[qi].ring;
}

static uint16_t take_desc(struct mock_queue *q)
{
	for (uint16_t i = 0; i < q->ring.num; i++) {
		if (!q->taken[i]) {
			q->taken[i] = true;
			return i;
		}
	}
	ck_abort_msg("no free descriptor");
	return 0;
}

static struct vring_desc desc_of(const struct mock_buf *out, unsigned nr_out,
	const struct mock_buf *in, unsigned i)
{
	const struct mock_buf *b = i < nr_out ? &out[i] : &in[i - nr_out];

	return (struct vring_desc){ .addr = b->at, .len = b->len,
		.flags = i < nr_out ? 0 : VRING_DESC_F_WRITE };
}

static uint16_t add_indirect(struct mock *m, struct mock_queue *q, const struct mock_buf *out,
	unsigned nr_out, const struct mock_buf *in, unsigned n)
{
	gpa_t at = mock_alloc(m, n * sizeof(struct vring_desc));
	struct vring_desc *t = mock_at(m, at, n * sizeof(*t));
	uint16_t head = take_desc(q);

	for (unsigned i = 0; i < n; i++) {
		t[i] = desc_of(out, nr_out, in, i);
		t[i].next = (uint16_t)(i + 1);
		t[i].flags |= i + 1 < n ? VRING_DESC_F_NEXT : 0;
	}
	q->ring.desc[head] = (struct vring_desc){ .addr = at, .len = n * sizeof(*t),
		.flags = VRING_DESC_F_INDIRECT };
	return head;
}

uint16_t mock_add(struct mock *m, unsigned qi, const struct mock_buf *out, unsigned nr_out,
	const struct mock_buf *in, unsigned nr_in)
{
	struct mock_queue *q = &m->q[qi];
	unsigned n = nr_out + nr_in;
	uint16_t head = 0, prev = 0;

	ck_assert_uint_ge(n, 1);
	if (m->indirect) {
		head = add_indirect(m, q, out, nr_out, in, n);
		q->nr[head] = 1;
		mock_offer(m, qi, head);
		return head;
	}
	for (unsigned i = 0; i < n; i++) {
		uint16_t d = take_desc(q);

		q->ring.desc[d] = desc_of(out, nr_out, in, i);
		if (i) {
			q->ring.desc[prev].flags |= VRING_DESC_F_NEXT;
			q->ring.desc[prev].next = d;
		} else {
			head = d;
		}
		prev = d;
	}
	q->nr[head] = (uint16_t)n;
	mock_offer(m, qi, head);
	return head;
}

void mock_offer(struct mock *m, unsigned qi, uint16_t head)
{
	struct vring *r = &m->q[qi].ring;
	uint16_t idx = r->avail->idx;

	r->avail->ring[idx % r->num] = head;
	__atomic_store_n(&r->avail->idx, (uint16_t)(idx + 1), __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void mock_indirect(struct mock *m, bool on)
{
	ck_assert(!on || (m->accepted >> VIRTIO_RING_F_INDIRECT_DESC & 1));
	m->indirect = on;
}

void mock_kick(struct mock *m, unsigned qi)
{
	mock_write(m, VIRTIO_MMIO_QUEUE_NOTIFY, qi);
}

static void free_chain(struct mock_queue *q, uint16_t head)
{
	uint16_t d = head;

	for (unsigned n = q->nr[head]; n; n--) {
		q->taken[d] = false;
		d = q->ring.desc[d].next;
	}
	q->nr[head] = 0;
}

bool mock_used(struct mock *m, unsigned qi, uint16_t *head, uint32_t *written)
{
	struct mock_queue *q = &m->q[qi];
	struct vring_used_elem e;

	if (__atomic_load_n(&q->ring.used->idx, __ATOMIC_ACQUIRE) == q->last_used)
		return false;
	e = q->ring.used->ring[q->last_used % q->ring.num];
	ck_assert_msg(e.id < q->ring.num && q->nr[e.id], "chain %u came back, but was not given", e.id);
	free_chain(q, (uint16_t)e.id);
	q->last_used++;
	if (head)
		*head = (uint16_t)e.id;
	if (written)
		*written = e.len;
	return true;
}

/* Wait for an interrupt until the deadline; acknowledge it. */
static void wait_irq(struct mock *m, uint64_t deadline)
{
	struct pollfd p = { .fd = virtio_mmio_irq_fd(mock_device(m)), .events = POLLIN };
	uint64_t now = loop_now(), count;
	uint32_t isr;

	ck_assert_msg(now < deadline, "no interrupt in time");
	poll(&p, 1, (int)((deadline - now) / 1000000) + 1);
	if (!(p.revents & POLLIN))
		return;
	ck_assert_int_eq(read(p.fd, &count, sizeof(count)), sizeof(count));
	isr = mock_read(m, VIRTIO_MMIO_INTERRUPT_STATUS);
	mock_write(m, VIRTIO_MMIO_INTERRUPT_ACK, isr);
	m->isr |= isr;
}

bool mock_wait(struct mock *m, unsigned qi, uint16_t *head, uint32_t *written)
{
	uint64_t deadline = loop_now() + MOCK_DEADLINE_MS * 1000000ull;
	struct mock_queue *q = &m->q[qi];

	for (;;) {
		if (mock_used(m, qi, head, written))
			return true;
		__atomic_store_n(&vring_used_event(&q->ring), q->last_used, __ATOMIC_RELAXED);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (mock_used(m, qi, head, written))
			return true;
		if (mock_status(m) & VIRTIO_CONFIG_S_NEEDS_RESET)
			return false;
		wait_irq(m, deadline);
	}
}

uint32_t mock_request(struct mock *m, unsigned qi, const struct mock_buf *out, unsigned nr_out,
	const struct mock_buf *in, unsigned nr_in)
{
	uint16_t head = mock_add(m, qi, out, nr_out, in, nr_in), got;
	uint32_t written = 0;

	mock_kick(m, qi);
	ck_assert_msg(mock_wait(m, qi, &got, &written), "the device needs a reset");
	ck_assert_uint_eq(got, head);
	return written;
}

void mock_wait_config(struct mock *m)
{
	uint64_t deadline = loop_now() + MOCK_DEADLINE_MS * 1000000ull;

	while (!(m->isr & VIRTIO_MMIO_INT_CONFIG))
		wait_irq(m, deadline);
	m->isr &= ~(uint32_t)VIRTIO_MMIO_INT_CONFIG;
}

void mock_wait_broken(struct mock *m)
{
	mock_wait_config(m);
	ck_assert(mock_status(m) & VIRTIO_CONFIG_S_NEEDS_RESET);
}

static void nothing(void *arg)
{
	(void)arg;
}

void mock_settle(struct mock *m)
{
	uint64_t deadline = loop_now() + MOCK_DEADLINE_MS * 1000000ull;
	struct loop_stats before, now;

	/* A kick is seen when the loop enters the kernel to sleep; what it led to is done by the sleep after. */
	loop_get_stats(m->vm.io, &before);
	do {
		loop_call(m->vm.io, nothing, NULL);
		loop_get_stats(m->vm.io, &now);
		ck_assert_msg(loop_now() < deadline, "the loop does not come to rest");
	} while (now.sleeps < before.sleeps + 3 || mock_device(m)->flushing);
}
