/*
 * qcow2 images damaged, mended, snapshotted, resized, and killed in between, with QEMU's tools as the second opinion.
 * The linker routes what writes to image files through here (--wrap), so that each state a kill can leave is made.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/image.h"
#include "block/qcow2.h"

#define DISK   (8u << 20)
#define SPOTS  32u                      /* stretches of 16 KiB with data, in the first half of the disk */
#define STRIDE (128u << 10)
#define SPOT   (16u << 10)

static struct error err;
static char dir[64], path[96], base[96];
static uint8_t want[2 * DISK], got[2 * DISK];

/* ---- QEMU's tools ---- */

__attribute__((format(printf, 1, 2)))
static int shell(const char *fmt, ...)
{
	char cmd[4096];
	va_list ap;
	int r;

	va_start(ap, fmt);
	vsnprintf(cmd, sizeof(cmd), fmt, ap);
	va_end(ap);
	r = system(cmd);
	return WIFEXITED(r) ? WEXITSTATUS(r) : -1;
}

static int qemu_check(const char *file)
{
	return shell("qemu-img check -q -T unsafe -f qcow2 %s >/dev/null 2>&1", file);
}

static bool no_tools(void)
{
	static int have = -1;

	if (have < 0)
		have = !shell("qemu-img --version >/dev/null 2>&1 && qemu-io --version >/dev/null 2>&1");
	if (!have)
		printf("no qemu-img and qemu-io here: nothing compared\n");
	return !have;
}

/* ---- images ---- */

static uint8_t spot_byte(unsigned spot)
{
	return (uint8_t)(spot + 1);
}

static void pattern(uint8_t *disk)
{
	memset(disk, 0, DISK);
	for (unsigned s = 0; s < SPOTS; s++)
		memset(disk + s * STRIDE, spot_byte(s), SPOT);
}

/* base: a disk with the pattern, made by QEMU. */
static void make_base(const char *options)
{
	char cmd[4096];
	int n;

	snprintf(dir, sizeof(dir), "/tmp/vmm-qcheck-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/disk.qcow2", dir);
	snprintf(base, sizeof(base), "%s/base.qcow2", dir);
	ck_assert_int_eq(shell("qemu-img create -q -f qcow2 -o %s %s %u", options, base, DISK), 0);
	n = snprintf(cmd, sizeof(cmd), "qemu-io -t unsafe -f qcow2");
	for (unsigned s = 0; s < SPOTS; s++)
		n += snprintf(cmd + n, sizeof(cmd) - (size_t)n, " -c 'write -P %u %u %u'", spot_byte(s), s * STRIDE, SPOT);
	ck_assert_int_eq(shell("%s %s >/dev/null", cmd, base), 0);
	pattern(want);
}

static void drop_base(void)
{
	shell("rm -r %s", dir);
}

static void copy_file(const char *from, const char *to)
{
	auto_close int in = open(from, O_RDONLY), out = open(to, O_RDWR | O_CREAT | O_TRUNC, 0600);
	off_t end = lseek(in, 0, SEEK_END), at = 0, n;

	ck_assert(in >= 0 && out >= 0 && !ftruncate(out, end));
	while ((at = lseek(in, at, SEEK_DATA)) >= 0 && at < end) {
		n = MIN(lseek(in, at, SEEK_HOLE) - at, (off_t)sizeof(got));
		ck_assert_int_eq(pread(in, got, (size_t)n, at), n);
		ck_assert_int_eq(pwrite(out, got, (size_t)n, at), n);
		at += n;
	}
}

static struct image *open_it(const char *file, bool readonly, bool repair)
{
	struct image_how how = { .format = "qcow2", .readonly = readonly, .repair = repair, .alone = true };
	struct image *i = NULL;
	int r = image_open(&i, file, &how, &err);

	ck_assert_msg(!r, "%s", err.msg);
	return i;
}

static void close_it(struct image *i)
{
	ck_assert_int_eq(image_close(i), 0);
}

static char last_words[200];

static void complain(struct image_check *c, const char *text)
{
	ck_assert_uint_le(c->words, 1000);
	snprintf(last_words, sizeof(last_words), "%s", text);
}

/* As qemu-img says it: 0 clean, 2 corrupt, 3 leaks, 1 not checked. */
static int check_it(const char *file, enum image_repair repair, struct image_check *c)
{
	struct image *i = open_it(file, repair == REPAIR_NONE, repair != REPAIR_NONE);
	int r;

	*c = (struct image_check){ .complain = complain };
	last_words[0] = 0;
	r = image_check(i, repair, c, &err);
	ck_assert_msg(!r, "%s", err.msg);
	close_it(i);
	if (c->errors)
		return 1;
	return c->corruptions > c->fixed_corruptions ? 2 : c->leaks > c->fixed_leaks ? 3 : 0;
}

static void expect_clean(const char *what)
{
	struct image_check c;

	ck_assert_msg(!check_it(path, REPAIR_NONE, &c), "%s: %s", what, last_words);
	ck_assert_msg(!qemu_check(path), "%s: qemu-img check", what);
}

/* What QEMU reads there. */
static void qemu_reads(const char *file, uint8_t *buf, size_t size)
{
	char raw[128];
	int fd;

	snprintf(raw, sizeof(raw), "%s/raw", dir);
	ck_assert_int_eq(shell("qemu-img convert -t unsafe -T unsafe -f qcow2 -O raw %s %s", file, raw), 0);
	fd = open(raw, O_RDONLY);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(pread(fd, buf, size, 0), (ssize_t)size);
	ck_assert_int_eq(lseek(fd, 0, SEEK_END), (off_t)size);
	close(fd);
	unlink(raw);
}

static void we_read(const char *file, uint8_t *buf, size_t size)
{
	struct image *i = open_it(file, true, false);

	ck_assert_uint_eq(image_size(i), size);
	ck_assert_int_eq(image_read(i, buf, size, 0), 0);
	close_it(i);
}

static void expect_content(const char *what, const uint8_t *disk, size_t size)
{
	we_read(path, got, size);
	ck_assert_msg(!memcmp(got, disk, size), "%s: content as we read it", what);
	qemu_reads(path, got, size);
	ck_assert_msg(!memcmp(got, disk, size), "%s: content as QEMU reads it", what);
}

/* ---- bytes ---- */

static struct qcow2_header head;
static int file;
static uint32_t cluster;

static void begin_damage(void)
{
	uint8_t b[QCOW2_HEAD];

	file = open(path, O_RDWR);
	ck_assert_int_ge(file, 0);
	ck_assert_int_eq(pread(file, b, sizeof(b), 0), sizeof(b));
	qcow2_header_from_disk(b, &head);
	cluster = 1u << head.cluster_bits;
}

static uint64_t peek(uint64_t off)
{
	uint64_t n = 0;

	ck_assert_int_eq(pread(file, &n, 8, (off_t)off), 8);
	return be64toh(n);
}

static void poke(uint64_t off, uint64_t n)
{
	n = htobe64(n);
	ck_assert_int_eq(pwrite(file, &n, 8, (off_t)off), 8);
}

static uint64_t file_end(void)
{
	struct stat st;

	fstat(file, &st);
	return ((uint64_t)st.st_size + cluster - 1) / cluster * cluster;
}

static unsigned entry_bytes(void)
{
	return head.incompatible & QCOW2_EXT_L2 ? 16 : 8;
}

/* Where the L2 entry of a guest offset stands. */
static uint64_t l2_place(uint64_t l1, uint64_t guest)
{
	uint64_t per = cluster / entry_bytes(), g = guest / cluster;

	return (peek(l1 + g / per * 8) & QCOW2_OFFSET) + g % per * entry_bytes();
}

static uint64_t spot_entry(unsigned spot)
{
	return l2_place(head.l1_offset, spot * STRIDE);
}

static uint64_t spot_host(unsigned spot)
{
	return peek(spot_entry(spot)) & QCOW2_OFFSET;
}

static uint64_t block_off(void)
{
	return peek(head.refcount_offset);
}

static void set_refs(uint64_t host, uint64_t val)
{
	unsigned bits = 1u << head.refcount_order;
	uint64_t per = (uint64_t)cluster * 8 / bits, n = host / cluster, at, be = htobe64(val << (64 - bits));
	uint8_t b;

	at = peek(head.refcount_offset + n / per * 8) + n % per * bits / 8;
	if (bits >= 8) {
		ck_assert_int_eq(pwrite(file, &be, bits / 8, (off_t)at), bits / 8);
		return;
	}
	ck_assert_int_eq(pread(file, &b, 1, (off_t)at), 1);
	b &= (uint8_t)~(((1u << bits) - 1) << n % (8 / bits) * bits);
	b |= (uint8_t)(val << n % (8 / bits) * bits);
	ck_assert_int_eq(pwrite(file, &b, 1, (off_t)at), 1);
}

/* ---- damage ---- */

static void leaked(void)
{
	uint64_t end = file_end();

	ck_assert_int_eq(ftruncate(file, (off_t)(end + cluster)), 0);
	set_refs(end, 1);
}

static void refcount_low(void)
{
	set_refs(spot_host(3), 0);
}

static void refcount_of_l2_low(void)
{
	set_refs(peek(head.l1_offset) & QCOW2_OFFSET, 0);
}

static void refcount_of_header_low(void)
{
	set_refs(0, 0);
}

static void refcount_high(void)
{
	set_refs(spot_host(3), head.refcount_order ? 3 : 1);
}

static void not_copied(void)
{
	poke(spot_entry(4), peek(spot_entry(4)) & ~QCOW2_COPIED);
}

static void l1_not_copied(void)
{
	poke(head.l1_offset, peek(head.l1_offset) & ~QCOW2_COPIED);
}

static void to_l1(void)
{
	poke(spot_entry(5), head.l1_offset | QCOW2_COPIED);
}

static void to_refcount_block(void)
{
	poke(spot_entry(5), block_off() | QCOW2_COPIED);
}

static void to_l2(void)
{
	poke(spot_entry(5), (peek(head.l1_offset) & QCOW2_OFFSET) | QCOW2_COPIED);
}

static void to_nowhere(void)
{
	poke(spot_entry(5), (file_end() + 100ull * cluster) | QCOW2_COPIED);
}

static void unaligned(void)
{
	poke(spot_entry(5), peek(spot_entry(5)) + 512);
}

static void two_on_one(void)
{
	poke(spot_entry(6), peek(spot_entry(5)));
}

static void reserved_bit(void)
{
	poke(spot_entry(6), peek(spot_entry(6)) | 1ull << 57);
}

static void table_entry_to_nowhere(void)
{
	poke(head.refcount_offset, (file_end() + 7ull * cluster));
}

static void table_entry_unaligned(void)
{
	poke(head.refcount_offset, block_off() + 512);
}

static void table_entry_odd(void)
{
	poke(head.refcount_offset, block_off() | 2);
}

static void table_entry_to_table(void)
{
	poke(head.refcount_offset, head.refcount_offset);
}

static void table_entry_to_data(void)
{
	poke(head.refcount_offset, spot_host(2));
}

static void table_entry_to_l2(void)
{
	poke(head.refcount_offset, peek(head.l1_offset) & QCOW2_OFFSET);
}

static void table_entry_none(void)
{
	poke(head.refcount_offset, 0);
}

static void block_zeroes(void)
{
	for (uint64_t at = 0; at < cluster; at += 8)
		poke(block_off() + at, 0);
}

static void l1_to_nowhere(void)
{
	poke(head.l1_offset, (file_end() + 9ull * cluster) | QCOW2_COPIED);
}

static void l1_unaligned(void)
{
	poke(head.l1_offset, peek(head.l1_offset) + 512);
}

static void l1_to_block(void)
{
	poke(head.l1_offset, block_off() | QCOW2_COPIED);
}

static void dirty_mark(void)
{
	poke(72, head.incompatible | QCOW2_DIRTY);
}

static void corrupt_mark(void)
{
	poke(72, head.incompatible | QCOW2_CORRUPT);
}

static void dirty_and_low(void)
{
	dirty_mark();
	refcount_low();
}

static void snapshot_bytes(void)
{
	poke(head.snapshots_offset + 32, UINT64_MAX);   /* VM state and size of the extra data */
}

static void snapshot_l1(void)
{
	poke(head.snapshots_offset, file_end() + 3ull * cluster);
}

static void shared_copied(void)
{
	poke(spot_entry(7), peek(spot_entry(7)) | QCOW2_COPIED);
}

static void snapshot_entry(void)
{
	poke(l2_place(peek(head.snapshots_offset), 5 * STRIDE), file_end() + 5ull * cluster);
}

static void compressed_copied(void)
{
	poke(spot_entry(5), peek(spot_entry(5)) | QCOW2_COPIED);
}

static void compressed_to_nowhere(void)
{
	poke(spot_entry(5), (peek(spot_entry(5)) & ~0xffffffull) + file_end() + 50ull * cluster);
}

static void ambiguous_subcluster(void)
{
	poke(spot_entry(5) + 8, peek(spot_entry(5) + 8) | peek(spot_entry(5) + 8) << 32);
}

#define NONE (-1)
#define ALL  (-2)

struct damage {
	const char *what;
	void (*make)(void);
	int lost;                       /* spot that need not read as before; NONE; ALL */
	int qemu, ours;                 /* class of the check, where they are not the same; 0: they are */
};

static void try_damage(const struct damage *d)
{
	struct image_check c;
	int qemu, ours, fixed;

	copy_file(base, path);
	begin_damage();
	d->make();
	close(file);
	qemu = qemu_check(path);
	ours = check_it(path, REPAIR_NONE, &c);
	if (d->ours)
		ck_assert_msg(ours == d->ours && qemu == d->qemu, "%s: class %d, QEMU's %d", d->what, ours, qemu);
	else
		ck_assert_msg(ours == qemu, "%s: class %d, QEMU's %d (%s)", d->what, ours, qemu, last_words);
	ck_assert_msg(last_words[0], "%s: no words", d->what);
	fixed = check_it(path, REPAIR_ALL, &c);
	ck_assert_msg(!fixed, "%s: left after the repair (%d)", d->what, fixed);
	ck_assert_uint_eq(c.fixed_corruptions, c.corruptions);
	expect_clean(d->what);
	if (d->lost == ALL)
		return;
	we_read(path, got, DISK);
	if (d->lost >= 0)       /* whole clusters around it */
		memcpy(got + (unsigned)d->lost * STRIDE, want + (unsigned)d->lost * STRIDE, SPOT);
	ck_assert_msg(!memcmp(got, want, DISK), "%s: other data changed", d->what);
}

static const struct damage plain[] = {
	{ "a leaked cluster", leaked, NONE },
	{ "refcount 0 of a cluster in use", refcount_low, NONE },
	{ "refcount 0 of an L2 table", refcount_of_l2_low, NONE },
	{ "refcount 0 of the header", refcount_of_header_low, NONE },
	{ "refcount too high", refcount_high, NONE },
	{ "COPIED not set", not_copied, NONE, 2, 3 },
	{ "COPIED not set in the L1 table", l1_not_copied, NONE, 2, 3 },
	{ "L2 entry to the L1 table", to_l1, 5 },
	{ "L2 entry to the refcount block", to_refcount_block, 5 },
	{ "L2 entry to the L2 table", to_l2, 5 },
	{ "L2 entry to nowhere", to_nowhere, 5 },
	{ "L2 entry unaligned", unaligned, NONE },
	{ "two guest clusters in one", two_on_one, 6 },
	{ "reserved bit in an L2 entry", reserved_bit, NONE },
	{ "refcount table entry to nowhere", table_entry_to_nowhere, NONE },
	{ "refcount table entry unaligned", table_entry_unaligned, NONE, 1, 2 },
	{ "refcount table entry with a low bit", table_entry_odd, NONE },
	{ "refcount table as a refcount block", table_entry_to_table, NONE },
	{ "data as a refcount block", table_entry_to_data, NONE },
	{ "an L2 table as a refcount block", table_entry_to_l2, NONE },
	{ "no refcount block", table_entry_none, NONE },
	{ "a refcount block of zeroes", block_zeroes, NONE },
	{ "L1 entry to nowhere", l1_to_nowhere, ALL },
	{ "L1 entry unaligned", l1_unaligned, NONE },
	{ "L1 entry to the refcount block", l1_to_block, ALL },
	{ "the dirty bit", dirty_mark, NONE },
	{ "the corrupt bit", corrupt_mark, NONE },
	{ "the dirty bit and a refcount", dirty_and_low, NONE },
};

static void try_all(const struct damage *list, size_t n)
{
	for (size_t k = 0; k < n; k++)
		try_damage(&list[k]);
}

START_TEST(damage_is_mended)
{
	static const char *const options[] = { "cluster_size=64k", "cluster_size=4k", "cluster_size=16k,extended_l2=on",
		"cluster_size=64k,refcount_bits=64", "cluster_size=16k,refcount_bits=2" };

	if (no_tools())
		return;
	for (size_t n = 0; n < ARRAY_LEN(options); n++) {
		make_base(options[n]);
		try_all(plain, ARRAY_LEN(plain));
		drop_base();
	}
}
END_TEST

START_TEST(damage_with_snapshots_is_mended)
{
	static const struct damage list[] = {
		{ "COPIED set on a shared cluster", shared_copied, NONE },
		{ "snapshot's L2 entry to nowhere", snapshot_entry, 5 },
		{ "snapshot table with garbage", snapshot_bytes, NONE, 1, 2 },
		{ "snapshot's L1 table outside", snapshot_l1, NONE },
		{ "a leaked cluster", leaked, NONE },
		{ "refcount 0 of a cluster in use", refcount_low, NONE },
		{ "no refcount block", table_entry_none, NONE },
	};

	if (no_tools())
		return;
	make_base("cluster_size=64k");
	ck_assert_int_eq(shell("qemu-img snapshot -c one %s && qemu-img snapshot -c two %s", base, base), 0);
	try_all(list, ARRAY_LEN(list));
	drop_base();
}
END_TEST

START_TEST(damage_of_subclusters_and_compressed)
{
	static const struct damage sub[] = {
		{ "a subcluster with data and zero", ambiguous_subcluster, 5 },
	};
	static const struct damage compressed[] = {
		{ "COPIED set on a compressed cluster", compressed_copied, NONE },
		{ "compressed cluster outside", compressed_to_nowhere, 5 },
		{ "a leaked cluster", leaked, NONE },
		{ "refcount 0 of a cluster in use", block_zeroes, NONE },
	};
	struct image_check c;

	if (no_tools())
		return;
	make_base("cluster_size=64k,extended_l2=on");
	for (size_t k = 0; k < ARRAY_LEN(sub); k++) {   /* QEMU 7.2 does not look at them */
		copy_file(base, path);
		begin_damage();
		sub[k].make();
		close(file);
		ck_assert_int_eq(check_it(path, REPAIR_NONE, &c), 2);
		ck_assert_int_eq(check_it(path, REPAIR_ALL, &c), 0);
		expect_clean(sub[k].what);
	}
	drop_base();
	make_base("cluster_size=64k");
	ck_assert_int_eq(shell("qemu-img convert -t unsafe -c -O qcow2 %s %s.c && mv %s.c %s", base, base, base, base), 0);
	ck_assert_int_eq(check_it(base, REPAIR_NONE, &c), 0);
	ck_assert_uint_eq(c.compressed, SPOTS);
	try_all(compressed, ARRAY_LEN(compressed));
	drop_base();
}
END_TEST

START_TEST(unusable_refcount_table_is_rebuilt)
{
	struct image_check c;

	if (no_tools())
		return;
	make_base("cluster_size=64k");
	for (unsigned k = 0; k < 3; k++) {
		static const uint64_t places[] = { 0x12345678, 1ull << 60, 512 };

		copy_file(base, path);
		begin_damage();
		poke(48, places[k]);
		close(file);
		ck_assert_int_eq(check_it(path, REPAIR_NONE, &c), 2);
		ck_assert_int_eq(check_it(path, REPAIR_ALL, &c), 0);
		expect_clean("refcount table elsewhere");
		expect_content("refcount table elsewhere", want, DISK);
	}
	drop_base();
}
END_TEST

START_TEST(leaks_only)
{
	struct image_check c;

	if (no_tools())
		return;
	make_base("cluster_size=64k");
	copy_file(base, path);
	begin_damage();
	leaked();
	close(file);
	ck_assert_int_eq(check_it(path, REPAIR_LEAKS, &c), 0);
	ck_assert_uint_eq(c.leaks, 1);
	ck_assert_uint_eq(c.fixed_leaks, 1);
	expect_clean("leaks");
	/* What nobody refers to may be the data that a broken entry meant: not freed. */
	copy_file(base, path);
	begin_damage();
	l1_unaligned();
	close(file);
	ck_assert_int_eq(check_it(path, REPAIR_LEAKS, &c), 2);
	ck_assert_uint_gt(c.leaks, 1);
	ck_assert_uint_eq(c.fixed_leaks, 0);
	ck_assert_int_eq(check_it(path, REPAIR_ALL, &c), 0);
	expect_content("found again", want, DISK);
	drop_base();
}
END_TEST

static uint64_t unreadable_off;

int __real_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off);
int __wrap_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off);

int __wrap_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off)
{
	if (unreadable_off && off <= unreadable_off && unreadable_off - off < len)
		return -EIO;
	return __real_meta_read(f, buf, len, off);
}

/* What an L2 table that cannot be read leads to looks unused: it must not be freed. */
START_TEST(unreadable_is_not_unused)
{
	struct image_check c;

	if (no_tools())
		return;
	make_base("cluster_size=64k");
	copy_file(base, path);
	begin_damage();
	leaked();
	unreadable_off = peek(head.l1_offset) & QCOW2_OFFSET;
	close(file);
	ck_assert_int_eq(check_it(path, REPAIR_ALL, &c), 1);
	ck_assert_uint_eq(c.fixed_leaks, 0);
	unreadable_off = 0;
	ck_assert_int_eq(check_it(path, REPAIR_NONE, &c), 3);
	ck_assert_uint_eq(c.leaks, 1);
	expect_content("not changed", want, DISK);
	drop_base();
}
END_TEST

static uint64_t qemu_number(const char *key)
{
	char cmd[256];
	uint64_t n = UINT64_MAX;
	FILE *f;

	snprintf(cmd, sizeof(cmd), "qemu-img check --output=json -f qcow2 %s | sed -n 's/.*\"%s\": \\([0-9]*\\).*/\\1/p'",
		path, key);
	f = popen(cmd, "r");
	ck_assert_ptr_nonnull(f);
	if (fscanf(f, "%lu", &n) != 1)
		n = 0;
	pclose(f);
	return n;
}

START_TEST(statistics_are_qemus)
{
	static const char *const options[] = { "cluster_size=64k", "cluster_size=512,refcount_bits=1", "compat=0.10" };
	struct image_check c;

	if (no_tools())
		return;
	for (size_t n = 0; n < ARRAY_LEN(options); n++) {
		make_base(options[n]);
		copy_file(base, path);
		ck_assert_int_eq(shell("qemu-io -t unsafe -f qcow2 -c 'discard 1M 128k' -c 'write 6M 64k' -c 'write 1M 256k' %s >/dev/null",
			path), 0);
		ck_assert_int_eq(check_it(path, REPAIR_NONE, &c), 0);
		ck_assert_uint_eq(c.clusters, qemu_number("total-clusters"));
		ck_assert_uint_eq(c.allocated, qemu_number("allocated-clusters"));
		ck_assert_uint_eq(c.fragmented, qemu_number("fragmented-clusters"));
		ck_assert_uint_eq(c.end, qemu_number("image-end-offset"));
		drop_base();
	}
}
END_TEST

/* ---- snapshots ---- */

static void second_pattern(uint8_t *disk)
{
	memset(disk + STRIDE, 0xee, SPOT / 2);
	memset(disk + 6 * STRIDE + 3 * SPOT, 0xdd, SPOT);
	memset(disk + 7u * (1u << 20), 0xcc, 5 * SPOT);
}

static void qemu_second_pattern(const char *name)
{
	ck_assert_int_eq(shell("qemu-io -t unsafe -f qcow2 -c 'write -P 0xee %u %u' -c 'write -P 0xdd %u %u' -c 'write -P 0xcc %u %u' "
		"%s >/dev/null", STRIDE, SPOT / 2, 6 * STRIDE + 3 * SPOT, SPOT, 7u << 20, 5 * SPOT, name), 0);
}

static void we_write_second_pattern(const char *name)
{
	struct image *i = open_it(name, false, false);

	memcpy(got, want, DISK);
	second_pattern(got);
	ck_assert_int_eq(image_write(i, got + STRIDE, SPOT / 2, STRIDE), 0);
	ck_assert_int_eq(image_write(i, got + 6 * STRIDE + 3 * SPOT, SPOT, 6 * STRIDE + 3 * SPOT), 0);
	ck_assert_int_eq(image_write(i, got + (7u << 20), 5 * SPOT, 7u << 20), 0);
	close_it(i);
}

enum snap_op { CREATE, APPLY, DELETE };

static int snapshot(const char *name, enum snap_op op, const char *which)
{
	struct image *i = open_it(name, false, false);
	int r = op == CREATE ? image_snapshot_create(i, which, &err) : op == APPLY ? image_snapshot_apply(i, which, &err)
		: image_snapshot_delete(i, which, &err);

	close_it(i);
	return r;
}

static unsigned list(const char *name, struct image_snapshot **ret)
{
	struct image *i = open_it(name, true, false);
	unsigned n;

	ck_assert_int_eq(image_snapshots(i, ret, &n, &err), 0);
	close_it(i);
	return n;
}

START_TEST(snapshots_ours_for_qemu)
{
	static const char *const options[] = { "cluster_size=64k", "cluster_size=4k", "cluster_size=16k,extended_l2=on",
		"compat=0.10", "cluster_size=4k,refcount_bits=4" };
	static uint8_t changed[DISK];

	if (no_tools())
		return;
	for (size_t n = 0; n < ARRAY_LEN(options); n++) {
		make_base(options[n]);
		copy_file(base, path);
		ck_assert_msg(!snapshot(path, CREATE, "one"), "%s", err.msg);
		expect_clean("one");
		expect_content("one", want, DISK);
		we_write_second_pattern(path);
		memcpy(changed, want, DISK);
		second_pattern(changed);
		expect_clean("one, written");
		ck_assert_msg(!snapshot(path, CREATE, "two"), "%s", err.msg);
		expect_clean("two");
		ck_assert_int_eq(shell("qemu-img snapshot -l %s | grep -q '^1 *one ' && qemu-img snapshot -l %s | grep -q '^2 *two '",
			path, path), 0);
		ck_assert_int_eq(shell("qemu-img snapshot -a one %s", path), 0);
		expect_content("one again", want, DISK);
		ck_assert_int_eq(shell("qemu-img snapshot -a 2 %s", path), 0);
		expect_content("two again", changed, DISK);
		expect_clean("applied by QEMU");
		ck_assert_int_eq(shell("qemu-img snapshot -d one %s && qemu-img snapshot -d two %s", path, path), 0);
		expect_clean("deleted by QEMU");
		expect_content("deleted by QEMU", changed, DISK);
		drop_base();
	}
}
END_TEST

START_TEST(snapshots_qemus_for_us)
{
	static const char *const options[] = { "cluster_size=64k", "cluster_size=4k", "cluster_size=16k,extended_l2=on",
		"compat=0.10" };
	static uint8_t changed[DISK];
	struct image_snapshot *all;

	if (no_tools())
		return;
	for (size_t n = 0; n < ARRAY_LEN(options); n++) {
		make_base(options[n]);
		copy_file(base, path);
		ck_assert_int_eq(shell("qemu-img snapshot -c one %s", path), 0);
		qemu_second_pattern(path);
		memcpy(changed, want, DISK);
		second_pattern(changed);
		ck_assert_int_eq(shell("qemu-img snapshot -c 'number two' %s", path), 0);
		ck_assert_uint_eq(list(path, &all), 2);
		ck_assert_str_eq(all[0].id, "1");
		ck_assert_str_eq(all[0].name, "one");
		ck_assert_str_eq(all[1].name, "number two");
		ck_assert_uint_eq(all[1].size, DISK);
		ck_assert_uint_gt(all[1].at_ns, 1500000000ull * 1000000000);
		free(all);
		ck_assert_msg(!snapshot(path, APPLY, "one"), "%s", err.msg);
		expect_clean("applied one");
		expect_content("applied one", want, DISK);
		ck_assert_msg(!snapshot(path, APPLY, "number two"), "%s", err.msg);
		expect_clean("applied two");
		expect_content("applied two", changed, DISK);
		ck_assert_msg(!snapshot(path, DELETE, "1"), "%s", err.msg);
		expect_clean("deleted one");
		expect_content("deleted one", changed, DISK);
		ck_assert_msg(!snapshot(path, DELETE, "2"), "%s", err.msg);
		expect_clean("deleted two");
		expect_content("deleted two", changed, DISK);
		ck_assert_uint_eq(list(path, &all), 0);
		free(all);
		drop_base();
	}
}
END_TEST

START_TEST(snapshots_of_compressed_clusters)
{
	struct image_check c;

	if (no_tools())
		return;
	make_base("cluster_size=64k");
	ck_assert_int_eq(shell("qemu-img convert -t unsafe -c -O qcow2 %s %s", base, path), 0);
	ck_assert_int_eq(snapshot(path, CREATE, "one"), 0);
	expect_clean("created");
	we_write_second_pattern(path);
	expect_clean("written");
	ck_assert_int_eq(snapshot(path, APPLY, "one"), 0);
	expect_clean("applied");
	expect_content("applied", want, DISK);
	ck_assert_int_eq(snapshot(path, DELETE, "one"), 0);
	expect_clean("deleted");
	expect_content("deleted", want, DISK);
	ck_assert_int_eq(check_it(path, REPAIR_NONE, &c), 0);
	ck_assert_uint_eq(c.compressed, SPOTS);
	drop_base();
}
END_TEST

START_TEST(snapshot_of_another_size)
{
	struct image *i;

	if (no_tools())
		return;
	make_base("cluster_size=4k");
	copy_file(base, path);
	ck_assert_int_eq(snapshot(path, CREATE, "small"), 0);
	i = open_it(path, false, false);
	ck_assert_msg(!image_resize(i, 2 * DISK, PREALLOC_OFF, false, &err), "%s", err.msg);
	ck_assert_int_eq(image_write(i, "end", 3, 2 * DISK - 3), 0);
	close_it(i);
	memset(want + DISK, 0, DISK);
	memcpy(want + 2 * DISK - 3, "end", 3);
	ck_assert_int_eq(snapshot(path, CREATE, "large"), 0);
	expect_clean("two sizes");
	ck_assert_int_eq(snapshot(path, APPLY, "small"), 0);
	expect_clean("small");
	expect_content("small", want, DISK);
	ck_assert_int_eq(snapshot(path, APPLY, "large"), 0);
	expect_content("large", want, 2 * DISK);
	ck_assert_int_eq(shell("qemu-img snapshot -a small %s", path), 0);
	expect_clean("small by QEMU");
	expect_content("small by QEMU", want, DISK);
	drop_base();
}
END_TEST

START_TEST(snapshots_refused)
{
	char name[300];

	if (no_tools())
		return;
	make_base("cluster_size=4k,refcount_bits=1");
	copy_file(base, path);
	ck_assert_int_eq(snapshot(path, CREATE, "one"), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "refcount_bits"));
	expect_clean("refused");
	expect_content("refused", want, DISK);
	drop_base();
	make_base("cluster_size=4k,refcount_bits=2");
	copy_file(base, path);
	ck_assert_int_eq(snapshot(path, CREATE, "one"), 0);
	ck_assert_int_eq(snapshot(path, CREATE, "one"), -EEXIST);
	ck_assert_int_eq(snapshot(path, CREATE, "two"), 0);
	ck_assert_int_eq(snapshot(path, CREATE, "three"), -EINVAL);
	ck_assert_int_eq(snapshot(path, APPLY, "one"), -EINVAL);
	ck_assert_int_eq(snapshot(path, APPLY, "four"), -ENOENT);
	ck_assert_int_eq(snapshot(path, DELETE, ""), -ENOENT);
	ck_assert_int_eq(snapshot(path, CREATE, ""), -EINVAL);
	memset(name, 'x', sizeof(name));
	name[256] = 0;
	ck_assert_int_eq(snapshot(path, CREATE, name), -EINVAL);
	expect_clean("refused");
	expect_content("refused", want, DISK);
	drop_base();
}
END_TEST

/* ---- sizes ---- */

static int resize(uint64_t size, enum image_prealloc prealloc)
{
	struct image *i = open_it(path, false, false);
	int r = image_resize(i, size, prealloc, true, &err);

	close_it(i);
	return r;
}

START_TEST(resized_both_ways)
{
	static const char *const options[] = { "cluster_size=64k", "cluster_size=4k", "cluster_size=512",
		"cluster_size=16k,extended_l2=on", "compat=0.10" };
	static uint8_t disk[2 * DISK];

	if (no_tools())
		return;
	for (size_t n = 0; n < ARRAY_LEN(options); n++) {
		make_base(options[n]);
		memcpy(disk, want, DISK);
		memset(disk + DISK, 0, DISK);
		copy_file(base, path);
		ck_assert_msg(!resize(DISK + 512 * 77, PREALLOC_OFF), "%s", err.msg);
		expect_clean("a little more");
		expect_content("a little more", disk, DISK + 512 * 77);
		ck_assert_msg(!resize(2 * DISK, PREALLOC_OFF), "%s", err.msg);
		expect_clean("twice");
		expect_content("twice", disk, 2 * DISK);
		ck_assert_msg(!resize(STRIDE + 512, PREALLOC_OFF), "%s", err.msg);
		expect_clean("little");
		expect_content("little", disk, STRIDE + 512);
		memset(disk + STRIDE + 512, 0, sizeof(disk) - STRIDE - 512);
		ck_assert_msg(!resize(DISK, PREALLOC_OFF), "%s", err.msg);
		expect_clean("larger again");
		expect_content("what was cut off is zeroes", disk, DISK);
		drop_base();
	}
}
END_TEST

START_TEST(grown_with_space)
{
	struct image_check c;

	if (no_tools())
		return;
	for (enum image_prealloc p = PREALLOC_METADATA; p <= PREALLOC_FULL; p++) {
		make_base("cluster_size=64k");
		memset(want + DISK, 0, DISK);
		copy_file(base, path);
		ck_assert_msg(!resize(2 * DISK, p), "%s", err.msg);
		expect_clean("preallocated");
		expect_content("preallocated", want, 2 * DISK);
		check_it(path, REPAIR_NONE, &c);
		ck_assert_uint_ge(c.allocated, DISK / (64u << 10));
		drop_base();
	}
}
END_TEST

START_TEST(resized_over_a_backing_image)
{
	char top[128];

	if (no_tools())
		return;
	make_base("cluster_size=64k");
	snprintf(top, sizeof(top), "%s/top.qcow2", dir);
	ck_assert_int_eq(shell("qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 %s 1M", top), 0);
	{
		struct image_how how = { .format = "qcow2", .backing_dir = "allow" };
		struct image *i;

		ck_assert_msg(!image_open(&i, top, &how, &err), "%s", err.msg);
		ck_assert_msg(!image_resize(i, 2 * DISK, PREALLOC_OFF, false, &err), "%s", err.msg);
		close_it(i);
	}
	memset(want + (1u << 20), 0, 2 * DISK - (1u << 20));
	qemu_reads(top, got, 2 * DISK);
	ck_assert_int_eq(memcmp(got, want, 2 * DISK), 0);
	ck_assert_int_eq(qemu_check(top), 0);
	drop_base();
}
END_TEST

START_TEST(shrunk_under_a_snapshot)
{
	if (no_tools())
		return;
	make_base("cluster_size=4k");
	copy_file(base, path);
	ck_assert_int_eq(snapshot(path, CREATE, "whole"), 0);
	ck_assert_msg(!resize(STRIDE + 512, PREALLOC_OFF), "%s", err.msg);
	expect_clean("shrunk");
	ck_assert_int_eq(snapshot(path, APPLY, "whole"), 0);
	expect_clean("whole");
	expect_content("whole", want, DISK);
	ck_assert_int_eq(snapshot(path, DELETE, "whole"), 0);
	expect_clean("deleted");
	drop_base();
	make_base("compat=0.10");
	copy_file(base, path);
	ck_assert_int_eq(snapshot(path, CREATE, "whole"), 0);
	ck_assert_int_eq(resize(2 * DISK, PREALLOC_OFF), -EOPNOTSUPP);
	ck_assert_int_eq(snapshot(path, DELETE, "whole"), 0);
	ck_assert_int_eq(resize(DISK / 2, PREALLOC_FULL), -EINVAL);
	drop_base();
}
END_TEST

/* ---- the backing file's name ---- */

static int rename_backing(const char *name, const char *format)
{
	struct image_how how = { .format = "qcow2", .alone = true };
	struct image *i;
	int r;

	ck_assert_msg(!image_open(&i, path, &how, &err), "%s", err.msg);
	r = image_set_backing(i, name, format, &err);
	if (!r && name) {
		ck_assert_str_eq(image_backing_name(i), name);
		ck_assert_str_eq(image_backing_format(i), format);
	} else if (!r) {
		ck_assert_ptr_null(image_backing_name(i));
	}
	close_it(i);
	return r;
}

START_TEST(backing_renamed)
{
	static const char *const options[] = { "cluster_size=64k", "cluster_size=512", "compat=0.10" };
	char name[1100];

	if (no_tools())
		return;
	memset(name, 'n', sizeof(name));
	for (size_t n = 0; n < ARRAY_LEN(options); n++) {
		make_base(options[n]);
		ck_assert_int_eq(shell("qemu-img create -q -f raw %s/other.raw %u && cp %s %s/other.qcow2", dir, DISK, base, dir), 0);
		copy_file(base, path);
		ck_assert_msg(!rename_backing("other.raw", "raw"), "%s", err.msg);
		expect_clean("a name");
		ck_assert_int_eq(shell("qemu-img info %s | grep -q '^backing file: other.raw' && "
			"qemu-img info %s | grep -q '^backing file format: raw'", path, path), 0);
		ck_assert_msg(!rename_backing("other.qcow2", "qcow2"), "%s", err.msg);
		ck_assert_int_eq(shell("qemu-img info %s | grep -q '^backing file: other.qcow2'", path), 0);
		qemu_reads(path, got, DISK);
		ck_assert_int_eq(memcmp(got, want, DISK), 0);
		ck_assert_msg(!rename_backing(NULL, NULL), "%s", err.msg);
		ck_assert_int_eq(shell("qemu-img info %s | grep -q '^backing'", path), 1);
		expect_clean("no name");
		expect_content("no name", want, DISK);
		name[1024] = 0;
		ck_assert_int_eq(rename_backing(name, "raw"), -EINVAL);
		name[1023] = 0;
		ck_assert_int_eq(rename_backing(name, "raw"), n == 1 ? -ENOSPC : 0);
		memset(name, 'n', sizeof(name));
		drop_base();
	}
}
END_TEST

/* ---- killed in between ---- */

enum op_kind { OP_PUT, OP_CLEAR, OP_SYNC, OP_CUT };
struct op {
	enum op_kind kind;
	uint64_t off, len;
	uint8_t *data;
};
static struct op ops[4096];
static unsigned op_n;
static bool recording;

int __real_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off);
int __wrap_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off);
int __real_meta_fill(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_fill(const struct host_file *f, uint64_t off, uint64_t len);
int __real_meta_zero(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_zero(const struct host_file *f, uint64_t off, uint64_t len);
int __real_meta_punch(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_punch(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_sync(const struct host_file *f);
int __real_ftruncate64(int fd, off_t size);
int __wrap_ftruncate64(int fd, off_t size);

static void record(enum op_kind kind, uint64_t off, uint64_t len, const void *data)
{
	struct op *o;

	if (!recording)
		return;
	ck_assert_uint_lt(op_n, ARRAY_LEN(ops));
	o = &ops[op_n++];
	*o = (struct op){ .kind = kind, .off = off, .len = len };
	if (data) {
		o->data = malloc(len);
		memcpy(o->data, data, len);
	}
}

int __wrap_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off)
{
	record(OP_PUT, off, len, buf);
	return __real_meta_write(f, buf, len, off);
}

int __wrap_meta_fill(const struct host_file *f, uint64_t off, uint64_t len)
{
	record(OP_CLEAR, off, len, NULL);
	return __real_meta_fill(f, off, len);
}

int __wrap_meta_zero(const struct host_file *f, uint64_t off, uint64_t len)
{
	record(OP_CLEAR, off, len, NULL);
	return __real_meta_zero(f, off, len);
}

int __wrap_meta_punch(const struct host_file *f, uint64_t off, uint64_t len)
{
	record(OP_CLEAR, off, len, NULL);
	return __real_meta_punch(f, off, len);
}

int __wrap_meta_sync(const struct host_file *f)
{
	(void)f;
	record(OP_SYNC, 0, 0, NULL);
	return 0;       /* no machine is cut off here, and it takes long */
}

int __wrap_ftruncate64(int fd, off_t size)
{
	record(OP_CUT, 0, (uint64_t)size, NULL);
	return __real_ftruncate64(fd, size);
}

static uint64_t seed = 88172645463325252ull;

static unsigned rnd(unsigned n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed % n);
}

/* What a kill before operation n leaves; lossy: of a machine, which may lose what was not synced. */
static void make_killed(unsigned n, bool lossy)
{
	unsigned synced = 0;
	int fd;

	copy_file(base, path);
	fd = open(path, O_RDWR);
	ck_assert_int_ge(fd, 0);
	for (unsigned k = 0; k < n; k++)
		if (ops[k].kind == OP_SYNC)
			synced = k;
	for (unsigned k = 0; k < n; k++) {
		const struct op *o = &ops[k];
		uint8_t *zeroes;

		if (o->kind == OP_CUT)
			ck_assert_int_eq(__real_ftruncate64(fd, (off_t)o->len), 0);
		if (lossy && k >= synced && rnd(2))
			continue;
		if (o->kind == OP_PUT)
			ck_assert_int_eq(pwrite(fd, o->data, o->len, (off_t)o->off), (ssize_t)o->len);
		if (o->kind != OP_CLEAR)
			continue;
		zeroes = calloc(1, o->len);
		ck_assert_int_eq(pwrite(fd, zeroes, o->len, (off_t)o->off), (ssize_t)o->len);
		free(zeroes);
	}
	close(fd);
}

struct change {
	const char *what;
	int (*make)(struct image *i);
	const uint8_t *old, *new;
	uint64_t old_size, new_size;
	bool cut;                       /* what is cut off may be gone before the size is */
	const uint8_t *one;             /* what snapshot "one" has, if there is one */
};

static bool is_state(const struct change *c, const uint8_t *disk, uint64_t size)
{
	if (size == c->new_size && !memcmp(disk, c->new, size))
		return true;
	if (size != c->old_size || !c->cut)
		return size == c->old_size && !memcmp(disk, c->old, size);
	for (uint64_t at = 0; at < size; at++)
		if (disk[at] != c->old[at] && (at < c->new_size || disk[at]))
			return false;
	return true;
}

static void check_killed(const struct change *c, unsigned n, bool lossy)
{
	struct image_snapshot *all;
	struct image_check found;
	struct image *i;
	uint64_t size;
	int r;

	make_killed(n, lossy);
	r = check_it(path, REPAIR_NONE, &found);
	ck_assert_msg(r == 0 || r == 3, "%s, killed before step %u of %u: %s", c->what, n, op_n, last_words);
	i = open_it(path, true, false);
	size = image_size(i);
	ck_assert_uint_le(size, sizeof(got));
	ck_assert_int_eq(image_read(i, got, size, 0), 0);
	close_it(i);
	ck_assert_msg(is_state(c, got, size), "%s, killed before step %u: neither the old content nor the new", c->what, n);
	if (lossy || n % 3)
		return;
	ck_assert_int_eq(check_it(path, REPAIR_LEAKS, &found), 0);
	ck_assert_msg(!qemu_check(path), "%s, killed before step %u, leaks freed: qemu-img check", c->what, n);
	if (!c->one)
		return;
	r = !list(path, &all) || strcmp(all[0].name, "one");
	free(all);
	if (r)
		return;
	ck_assert_int_eq(snapshot(path, APPLY, "one"), 0);
	expect_content("the snapshot", c->one, DISK);
	expect_clean("the snapshot");
}

static void kill_everywhere(const struct change *c)
{
	struct image *i;

	copy_file(base, path);
	op_n = 0;
	recording = true;
	i = open_it(path, false, false);
	ck_assert_msg(!c->make(i), "%s: %s", c->what, err.msg);
	close_it(i);
	recording = false;
	expect_clean(c->what);
	expect_content(c->what, c->new, c->new_size);
	for (unsigned n = 0; n <= op_n; n++) {
		check_killed(c, n, false);
		check_killed(c, n, true);
	}
	while (op_n)
		free(ops[--op_n].data);
}

static int create_two(struct image *i)
{
	return image_snapshot_create(i, "two", &err);
}

static int apply_one(struct image *i)
{
	return image_snapshot_apply(i, "one", &err);
}

static int delete_one(struct image *i)
{
	return image_snapshot_delete(i, "one", &err);
}

START_TEST(snapshots_killed)
{
	static uint8_t first[DISK], second[DISK];

	if (no_tools())
		return;
	make_base("cluster_size=4k");
	memcpy(first, want, DISK);
	memcpy(second, want, DISK);
	second_pattern(second);
	ck_assert_int_eq(shell("qemu-img snapshot -c one %s", base), 0);
	qemu_second_pattern(base);
	kill_everywhere(&(struct change){ "create", create_two, second, second, DISK, DISK, false, first });
	kill_everywhere(&(struct change){ "apply", apply_one, second, first, DISK, DISK, false, first });
	kill_everywhere(&(struct change){ "delete", delete_one, second, second, DISK, DISK, false, first });
	drop_base();
}
END_TEST

static int grow_it(struct image *i)
{
	return image_resize(i, DISK + DISK / 2, PREALLOC_OFF, false, &err);
}

static int shrink_it(struct image *i)
{
	return image_resize(i, DISK / 4 + 512, PREALLOC_OFF, true, &err);
}

START_TEST(sizes_killed)
{
	static uint8_t disk[2 * DISK];

	if (no_tools())
		return;
	make_base("cluster_size=4k");
	memset(disk, 0, sizeof(disk));
	memcpy(disk, want, DISK);
	kill_everywhere(&(struct change){ "grow", grow_it, disk, disk, DISK, DISK + DISK / 2, false, NULL });
	kill_everywhere(&(struct change){ "shrink", shrink_it, disk, disk, DISK, DISK / 4 + 512, true, NULL });
	drop_base();
}
END_TEST

static int name_it(struct image *i)
{
	int r = image_set_backing(i, "other.raw", "raw", &err);

	r = r ? r : image_set_backing(i, "./././other.raw", "raw", &err);
	return r ? r : image_set_backing(i, NULL, NULL, &err);
}

START_TEST(names_killed)
{
	if (no_tools())
		return;
	make_base("cluster_size=4k");
	ck_assert_int_eq(shell("qemu-img create -q -f raw %s/other.raw %u", dir, DISK), 0);
	kill_everywhere(&(struct change){ "names", name_it, want, want, DISK, DISK, false, NULL });
	drop_base();
}
END_TEST

static int mend_it(struct image *i)
{
	struct image_check c = { 0 };

	return image_check(i, REPAIR_ALL, &c, &err);
}

/* Mending that was killed is done again. */
static void kill_mending(void (*damage)(void))
{
	struct image_check c;
	struct image *i;

	copy_file(base, path);
	begin_damage();
	damage();
	close(file);
	ck_assert_int_eq(rename(path, base), 0);
	copy_file(base, path);
	op_n = 0;
	recording = true;
	i = open_it(path, false, true);
	ck_assert_int_eq(mend_it(i), 0);
	close_it(i);
	recording = false;
	for (unsigned n = 0; n <= op_n; n++) {
		make_killed(n, n & 1);
		ck_assert_int_eq(check_it(path, REPAIR_ALL, &c), 0);
		expect_clean("mended twice");
		expect_content("mended twice", want, DISK);
	}
	while (op_n)
		free(ops[--op_n].data);
}

START_TEST(mending_killed)
{
	static void (*const list[])(void) = { table_entry_none, unaligned, l1_unaligned, dirty_and_low, snapshot_l1 };

	if (no_tools())
		return;
	for (size_t n = 0; n < ARRAY_LEN(list); n++) {
		make_base("cluster_size=16k");
		ck_assert_int_eq(shell("qemu-img snapshot -c one %s && qemu-img snapshot -c two %s", base, base), 0);
		kill_mending(list[n]);
		drop_base();
	}
}
END_TEST

/* ---- large claims ---- */

START_TEST(far_references_cost_little)
{
	struct image_check c;
	uint64_t l2;

	if (no_tools())
		return;
	make_base("cluster_size=64k");
	copy_file(base, path);
	begin_damage();
	l2 = peek(head.l1_offset) & QCOW2_OFFSET;
	if (!ftruncate(file, 4ll << 40)) {
		/* Each entry another 256 MiB further, and nothing there. */
		for (unsigned n = 0; n < cluster / 8; n++)
			poke(l2 + n * 8, ((1ull << 30) + n * (256ull << 20)) | QCOW2_COPIED);
		close(file);
		ck_assert_int_eq(check_it(path, REPAIR_NONE, &c), 2);
		ck_assert_int_eq(check_it(path, REPAIR_ALL, &c), 0);
		ck_assert_int_eq(check_it(path, REPAIR_NONE, &c), 0);
	}
	drop_base();
}
END_TEST

START_TEST(many_ways_to_one_table)
{
	struct image_check c;

	if (no_tools())
		return;
	make_base("cluster_size=64k");
	ck_assert_int_eq(shell("rm %s && qemu-img create -q -f qcow2 %s 60T && qemu-io -f qcow2 -c 'write 0 64k' %s >/dev/null",
		base, base, base), 0);
	copy_file(base, path);
	begin_damage();
	for (uint64_t n = 1; n < head.l1_size; n++)     /* 120,000 ways to 8192 entries */
		poke(head.l1_offset + n * 8, peek(head.l1_offset));
	close(file);
	ck_assert_int_eq(check_it(path, REPAIR_NONE, &c), 2);
	drop_base();
}
END_TEST

UNIT_MAIN("qcheck", damage_is_mended, damage_with_snapshots_is_mended, damage_of_subclusters_and_compressed,
	unusable_refcount_table_is_rebuilt, leaks_only, unreadable_is_not_unused, statistics_are_qemus, far_references_cost_little,
	many_ways_to_one_table, snapshots_ours_for_qemu, snapshots_qemus_for_us, snapshots_of_compressed_clusters,
	snapshot_of_another_size, snapshots_refused, resized_both_ways, grown_with_space, resized_over_a_backing_image,
	shrunk_under_a_snapshot, backing_renamed, snapshots_killed, sizes_killed, names_killed,
	mending_killed)
