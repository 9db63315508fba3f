/*
 * A polling virtio-blk driver in ring 3: reads or writes at a fixed depth and says '<' when it starts and '>' when
 * it ends; the host's clock measures. Keys on the command line: depth= (to 64), bs= (bytes), n= (requests), seq
 * (else random), write (else read), stay (do not leave: to be looked at). Finds the device on any modern virtio-mmio slot of vmm or of QEMU's microvm.
 */
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QUEUE   256
#define DEPTH   64              /* three descriptors each */
#define BUFFERS 0x1000000ull    /* 16 MiB: where the data goes */
#define MAGIC   0x74726976u     /* "virt" */

void payload(uint32_t start_info);

static struct vring_desc desc[QUEUE] __attribute__((aligned(4096)));
static union {
	struct vring_avail a;
	uint8_t room[4 + 2 * QUEUE + 2];
} avail __attribute__((aligned(4096)));
static union {
	struct vring_used u;
	uint8_t room[4 + 8 * QUEUE + 2];
} used __attribute__((aligned(4096)));
static struct virtio_blk_outhdr header[DEPTH];
static volatile uint8_t status[DEPTH];

static volatile uint8_t *regs;
static uint64_t blocks, sectors_each, next_block;
static uint64_t seed = 88172645463325252ull;
static bool sequential, writing;

static void outb(uint16_t port, uint8_t val)
{
	__asm__ volatile("outb %0, %1" : : "a"(val), "Nd"(port));
}

static void say(const char *s)
{
	while (*s)
		outb(0x3f8, (uint8_t)*s++);
}

__attribute__((noreturn)) static void leave(uint8_t value)
{
	outb(0xf4, value);
	for (;;)
		__asm__ volatile("pause");
}

static uint32_t reg(unsigned off)
{
	return *(volatile uint32_t *)(regs + off);
}

static void set_reg(unsigned off, uint32_t val)
{
	*(volatile uint32_t *)(regs + off) = val;
}

/* The number after "key" on the command line. */
static uint64_t number(const char *cmdline, const char *key, uint64_t otherwise)
{
	for (const char *p = cmdline; *p; p++) {
		const char *a = p, *b = key;
		uint64_t v = 0;

		while (*b && *a == *b)
			a++, b++;
		if (*b || (p > cmdline && p[-1] != ' '))
			continue;
		if (*a < '0' || *a > '9')
			return 1;
		for (; *a >= '0' && *a <= '9'; a++)
			v = v * 10 + (uint64_t)(*a - '0');
		return v;
	}
	return otherwise;
}

static bool look_at(uint64_t base)
{
	regs = (volatile uint8_t *)base;
	return reg(VIRTIO_MMIO_MAGIC_VALUE) == MAGIC && reg(VIRTIO_MMIO_VERSION) == 2 &&
		reg(VIRTIO_MMIO_DEVICE_ID) == VIRTIO_ID_BLOCK;
}

static bool find_device(void)
{
	for (unsigned i = 0; i < 32; i++)
		if (look_at(0xd0000000 + i * 0x1000ull) || look_at(0xfeb00000 + i * 0x200ull))
			return true;
	return false;
}

static void set_address(unsigned off, const volatile void *p)
{
	set_reg(off, (uint32_t)(uintptr_t)p);
	set_reg(off + 4, 0);
}

static bool start_device(void)
{
	uint8_t s = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;

	set_reg(VIRTIO_MMIO_STATUS, 0);
	set_reg(VIRTIO_MMIO_STATUS, s);
	set_reg(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
	set_reg(VIRTIO_MMIO_DRIVER_FEATURES, 1u << VIRTIO_BLK_F_FLUSH);        /* else every write goes to the medium */
	set_reg(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
	set_reg(VIRTIO_MMIO_DRIVER_FEATURES, 1u << (VIRTIO_F_VERSION_1 - 32));
	s |= VIRTIO_CONFIG_S_FEATURES_OK;
	set_reg(VIRTIO_MMIO_STATUS, s);
	set_reg(VIRTIO_MMIO_QUEUE_SEL, 0);
	if (reg(VIRTIO_MMIO_QUEUE_NUM_MAX) < QUEUE || !(reg(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK))
		return false;
	set_reg(VIRTIO_MMIO_QUEUE_NUM, QUEUE);
	set_address(VIRTIO_MMIO_QUEUE_DESC_LOW, desc);
	set_address(VIRTIO_MMIO_QUEUE_AVAIL_LOW, &avail);
	set_address(VIRTIO_MMIO_QUEUE_USED_LOW, &used);
	avail.a.flags = VRING_AVAIL_F_NO_INTERRUPT;
	set_reg(VIRTIO_MMIO_QUEUE_READY, 1);
	set_reg(VIRTIO_MMIO_STATUS, s | VIRTIO_CONFIG_S_DRIVER_OK);
	return !(reg(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET);
}

/* Make request i available again, somewhere else; the caller publishes. */
static uint16_t offer(uint16_t idx, unsigned i)
{
	uint64_t block = next_block++;

	if (!sequential) {
		seed ^= seed << 13;
		seed ^= seed >> 7;
		seed ^= seed << 17;
		block = seed;
	}
	header[i].sector = block % blocks * sectors_each;
	status[i] = 0xff;
	((volatile uint16_t *)avail.a.ring)[idx % QUEUE] = (uint16_t)(i * 3);
	return (uint16_t)(idx + 1);
}

static void publish(uint16_t idx)
{
	__atomic_store_n(&avail.a.idx, idx, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!(__atomic_load_n(&used.u.flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY))
		set_reg(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
}

static bool run(unsigned depth, uint64_t n)
{
	static uint16_t seen, idx;
	uint64_t offered = 0, done = 0;

	for (; offered < depth; offered++)
		idx = offer(idx, (unsigned)offered);
	publish(idx);
	while (done < n) {
		uint16_t now = __atomic_load_n(&used.u.idx, __ATOMIC_ACQUIRE), was = idx;

		if (now == seen) {
			__asm__ volatile("pause");
			continue;
		}
		for (; seen != now; seen++, done++) {
			unsigned i = ((volatile struct vring_used_elem *)used.u.ring)[seen % QUEUE].id / 3;

			if (status[i] != VIRTIO_BLK_S_OK)
				return false;
			if (offered < n) {
				idx = offer(idx, i);
				offered++;
			}
		}
		if (idx != was)
			publish(idx);
	}
	return true;
}

static void fill_descriptors(unsigned depth, uint32_t size)
{
	for (unsigned i = 0; i < depth; i++) {
		struct vring_desc *d = desc + i * 3;

		d[0] = (struct vring_desc){ (uintptr_t)&header[i], sizeof(header[i]), VRING_DESC_F_NEXT,
			(uint16_t)(i * 3 + 1) };
		d[1] = (struct vring_desc){ BUFFERS + i * (uint64_t)size, size,
			VRING_DESC_F_NEXT | (writing ? 0 : VRING_DESC_F_WRITE), (uint16_t)(i * 3 + 2) };
		d[2] = (struct vring_desc){ (uintptr_t)&status[i], 1, VRING_DESC_F_WRITE, 0 };
		header[i].type = writing ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
	}
}

/* Nothing that could be taken for zeroes, and no two blocks alike. */
static void fill_buffers(uint64_t bytes)
{
	uint64_t *p = (uint64_t *)BUFFERS;

	for (uint64_t i = 0; i < bytes / 8; i++)
		p[i] = i * 0x9e3779b97f4a7c15ull + 1;
}

void payload(uint32_t start_info)
{
	/* Xen's hvm_start_info: the command line's address lies at 24 */
	const char *cmdline = (const char *)*(const uint64_t *)(uintptr_t)(start_info + 24);
	unsigned depth = (unsigned)number(cmdline, "depth=", 1);
	uint32_t size = (uint32_t)number(cmdline, "bs=", 4096);
	uint64_t n = number(cmdline, "n=", 1000);

	sequential = number(cmdline, "seq", 0);
	writing = number(cmdline, "write", 0);
	if (!depth || depth > DEPTH || !size || size % 512 || n < depth || !find_device() || !start_device()) {
		say("no device, or a bad command line\n");
		leave(1);
	}
	sectors_each = size / 512;
	blocks = (reg(VIRTIO_MMIO_CONFIG) | (uint64_t)reg(VIRTIO_MMIO_CONFIG + 4) << 32) / sectors_each;
	fill_buffers((uint64_t)depth * size);
	fill_descriptors(depth, size);
	if (!blocks || !run(depth, depth * 8)) {        /* warm: every buffer touched, the loop awake */
		say("a request failed\n");
		leave(1);
	}
	say("<");
	if (!run(depth, n))
		leave(1);
	say(">");
	while (number(cmdline, "stay", 0))
		__asm__ volatile("pause");
	leave(0);
}
