/*
 * Many requests at once over every format that can be made and written, against a model of the disk. The ring decides
 * in which order they end; metadata is made to come through it (--wrap), the files sit on a backing image or not.
 * What is left on the disk afterwards is opened, compared and checked.
 */
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "unit.h"
#include "block/format.h"
#include "vmm/block.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/image.h"
#include "vmm/opts.h"

#define SIZE  (4u << 20)
#define DEPTH 16
#define OPS   3000
#define SPAN  (192u << 10)      /* most bytes of a request */

static struct error err;
static struct loop *loop;
static struct disk *disk;
static char dir[64], path[128], base[128];
static uint8_t model[SIZE], now[SIZE];
static uint64_t seed;

static bool through_ring;       /* no metadata is found in the page cache */
static int failing;             /* this many workers' jobs and transfers until one fails; 0: none does */
static int failing_kind = -1;   /* only those of this kind; -1: all */
static int fail_with;
static _Atomic int sync_error;  /* of the next sync */

static unsigned rnd(unsigned n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed % n);
}

void __real_loop_submit(struct loop *l, struct loop_op *op);
void __wrap_loop_submit(struct loop *l, struct loop_op *op);
ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);

int __real_meta_sync(const struct host_file *f);
int __wrap_meta_sync(const struct host_file *f);

int __wrap_meta_sync(const struct host_file *f)
{
	int r = sync_error;

	sync_error = 0;         /* said once, like the kernel does */
	return r ? r : __real_meta_sync(f);
}

static int give_fault(struct loop_op *op)
{
	return op->fd;
}

void __wrap_loop_submit(struct loop *l, struct loop_op *op)
{
	if (failing && (failing_kind < 0 || failing_kind == (int)op->kind) && !--failing) {
		op->kind = OP_WORK;
		op->work = give_fault;
		op->fd = fail_with;
	}
	__real_loop_submit(l, op);
}

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	if (through_ring && rnd(2)) {
		errno = EAGAIN;
		return -1;
	}
	return __real_preadv64v2(fd, iov, cnt, off, flags);
}

/* ---- one of many requests ---- */

struct slot {
	struct blk_req r;
	struct iovec iov[3];
	uint8_t data[SPAN];
	bool busy;
	int err;
};

static struct slot slot[DEPTH];
static unsigned todo, underway, failures;
static sem_t all_done;

static bool overlaps(uint64_t off, uint64_t len)
{
	for (unsigned k = 0; k < DEPTH; k++)
		if (slot[k].busy && slot[k].r.op != BLK_FLUSH && off < slot[k].r.off + slot[k].r.len &&
			slot[k].r.off < off + len)
			return true;
	return false;
}

static void start(struct slot *s);

/* Check's asserts are for the main thread. */
static void wrong(const struct blk_req *r, const char *what)
{
	const uint64_t *got = (const uint64_t *)container_of(r, struct slot, r)->data;

	for (uint64_t k = 0; r->op == BLK_READ && k < r->len; k += 8)
		if (got[k / 8] != *(uint64_t *)(model + r->off + k)) {
			fprintf(stderr, "at %llu: %llx, not %llx\n", (unsigned long long)(r->off + k),
				(unsigned long long)got[k / 8], *(unsigned long long *)(model + r->off + k));
			k |= 511;
			k -= 7;
		}
	fprintf(stderr, "%s: kind %d at %llu+%llu: %s\n", path, r->op, (unsigned long long)r->off,
		(unsigned long long)r->len, what);
	abort();
}

static void done(struct blk_req *r, int error)
{
	struct slot *s = container_of(r, struct slot, r);

	failures += error != 0;
	if (!fail_with && error)
		wrong(r, strerrordesc_np(-error));
	if (!error && !fail_with && r->op == BLK_READ && memcmp(s->data, model + r->off, r->len))
		wrong(r, "other bytes");        /* what a failed write left would be open */
	s->busy = false;
	underway--;
	start(s);
	if (!todo && !underway)
		sem_post(&all_done);
}

static void cut(struct slot *s)
{
	size_t a = 1 + rnd((unsigned)s->r.len - 1), b = rnd((unsigned)(s->r.len - a) + 1);

	s->iov[0] = (struct iovec){ s->data, a };
	s->iov[1] = (struct iovec){ s->data + a, b };
	s->iov[2] = (struct iovec){ s->data + a + b, s->r.len - a - b };
	s->r.iov = s->iov;
	s->r.cnt = s->iov[2].iov_len ? 3 : s->iov[1].iov_len ? 2 : 1;
}

static void start(struct slot *s)
{
	static const enum blk_op kinds[] = { BLK_READ, BLK_READ, BLK_READ, BLK_WRITE, BLK_WRITE, BLK_WRITE, BLK_WRITE,
		BLK_ZERO, BLK_ZERO, BLK_FLUSH };
	uint64_t len = 512 * (1 + rnd(rnd(6) ? 24 : SPAN / 512)), off = 512 * (uint64_t)rnd(SIZE / 512);

	if (!todo || s->busy)
		return;
	todo--;
	len = MIN(len, SIZE - off);
	if (overlaps(off, len))
		len = 0;
	s->r = (struct blk_req){ .op = len ? kinds[rnd(10)] : BLK_FLUSH, .off = off, .len = len,
		.unmap = rnd(2), .done = done };
	if (s->r.op == BLK_READ || s->r.op == BLK_WRITE)
		cut(s);
	if (s->r.op == BLK_WRITE) {
		for (size_t k = 0; k < len; k += 8)
			*(uint64_t *)(s->data + k) = seed + k;
		memcpy(model + off, s->data, len);
	} else if (s->r.op == BLK_ZERO) {
		memset(model + off, 0, len);
	}
	s->busy = true;
	underway++;
	disk_submit(disk, &s->r);
}

static void start_all(void *arg)
{
	(void)arg;
	underway++;     /* none is the last before all are started */
	for (unsigned k = 0; k < DEPTH; k++)
		start(&slot[k]);
	underway--;
	if (!todo && !underway)
		sem_post(&all_done);
}

static void drain(void *arg)
{
	(void)arg;
	disk_drain(disk);
}

/* ---- images ---- */

static void make(const char *at, const char *format, const char *backing, uint32_t cluster)
{
	struct image_create c = { .format = format, .size = SIZE, .backing = backing,
		.backing_format = backing ? "raw" : NULL, .cluster = cluster };

	ck_assert_msg(!image_create(at, &c, &err), "%s", err.msg);
}

static void make_base(void)
{
	int fd = open(base, O_RDWR | O_CREAT | O_TRUNC, 0600);

	ck_assert_int_ge(fd, 0);
	memset(model, 0, SIZE);
	for (size_t k = 0; k < SIZE; k += 8)    /* half of it, in patches */
		if (k / 40000 % 2)
			*(uint64_t *)(model + k) = k * 0x9e3779b97f4a7c15ull;
	ck_assert_int_eq(write(fd, model, SIZE), SIZE);
	close(fd);
}

static void setup(void)
{
	snprintf(dir, sizeof(dir), "/tmp/vmm-request-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/disk", dir);
	snprintf(base, sizeof(base), "%s/base", dir);
	memset(model, 0, SIZE);
	seed = 88172645463325252ull;
	failures = 0;
	failing = fail_with = 0;
	sem_init(&all_done, 0, 0);
}

static void teardown(void)
{
	unlink(path);
	unlink(base);
	rmdir(dir);
	sem_destroy(&all_done);
}

static void open_disk(const char *keys, enum loop_engine engine)
{
	char text[300];
	struct opts *o;

	snprintf(text, sizeof(text), "%s,%s", path, keys);
	ck_assert_int_eq(opts_parse(&o, "--disk", text, "file", &err), 0);
	ck_assert_msg(!disk_open(&disk, o, &err), "%s", err.msg);
	opts_free(o);
	loop = loop_new("io/0", engine, 0, &err);
	disk_set_home(disk, loop);
}

static void close_disk(void)
{
	loop_call(loop, drain, NULL);
	loop_free(loop);
	disk_close(disk);
}

static void work(const char *keys, enum loop_engine engine, unsigned ops)
{
	open_disk(keys, engine);
	todo = ops;
	loop_call(loop, start_all, NULL);
	sem_wait(&all_done);
	close_disk();
}

/* ---- one request at a time ---- */

static void one_done(struct blk_req *r, int error)
{
	container_of(r, struct slot, r)->err = error;
	sem_post(&all_done);
}

static void submit_here(void *arg)
{
	disk_submit(disk, &((struct slot *)arg)->r);
}

static void submit_and_drain(void *arg)
{
	submit_here(arg);
	disk_drain(disk);
}

/* Its error. A read leaves its bytes in slot[0].data, a write takes them from there. */
static int one(enum blk_op op, uint64_t off, uint64_t len)
{
	struct slot *s = &slot[0];

	s->iov[0] = (struct iovec){ s->data, len };
	s->r = (struct blk_req){ .op = op, .off = off, .len = len, .iov = s->iov, .cnt = 1, .done = one_done };
	loop_call(loop, submit_here, s);
	sem_wait(&all_done);
	return s->err;
}

static void complain(struct image_check *c, const char *text)
{
	(void)c;
	printf("%s: %s\n", path, text);
}

static void check_image(const char *format, bool exact)
{
	struct image_how how = { .format = format, .readonly = true, .backing_dir = "allow" };
	struct image_check c = { .complain = complain };
	struct image *i;
	int r;

	ck_assert_msg(!image_open(&i, path, &how, &err), "%s", err.msg);
	if (exact) {
		ck_assert_int_eq(image_read(i, now, SIZE, 0), 0);
		for (size_t k = 0; k < SIZE; k += 512)
			ck_assert_msg(!memcmp(now + k, model + k, 512), "%s: sector at %zu", format, k);
	}
	r = image_check(i, REPAIR_NONE, &c, &err);
	if (r != -EOPNOTSUPP) {
		ck_assert_msg(!r, "%s", err.msg);
		ck_assert_uint_eq(c.corruptions, 0);
		ck_assert(!exact || !c.leaks);
	}
	image_close(i);
}

static void one_format(const char *format, bool backed, uint32_t cluster, enum loop_engine engine)
{
	char keys[100];

	setup();
	if (backed)
		make_base();
	make(path, format, backed ? "base" : NULL, cluster);
	snprintf(keys, sizeof(keys), "format=%s,backing=allow", format);
	work(keys, engine, OPS);
	check_image(format, true);
	teardown();
}

static bool here(const char *format)
{
	return image_can_create(format) && image_can_write(format);
}

START_TEST(every_format_keeps_what_was_written)
{
	const char *const *f = image_formats();

	for (; *f; f++)
		for (int engine = LOOP_URING; engine <= LOOP_EPOLL; engine++) {
			through_ring = engine == LOOP_URING;
			if (here(*f))
				one_format(*f, false, 0, engine);
		}
	through_ring = false;
}
END_TEST

START_TEST(what_is_missing_comes_from_the_backing_image)
{
	static const uint32_t clusters[] = { 512, 4096, 0, 1u << 20 };

	through_ring = true;
	for (size_t k = 0; here("qcow2") && k < ARRAY_LEN(clusters); k++)
		one_format("qcow2", true, clusters[k], LOOP_URING);
	through_ring = false;
}
END_TEST

START_TEST(thrown_away_writes_leave_the_file_alone)
{
	struct stat before, after;

	if (!here("qcow2"))
		return;
	setup();
	make_base();
	ck_assert_int_eq(rename(base, path), 0);
	ck_assert_int_eq(stat(path, &before), 0);
	work("snapshot", LOOP_URING, OPS);
	ck_assert_int_eq(stat(path, &after), 0);
	ck_assert_int_eq(before.st_mtim.tv_nsec, after.st_mtim.tv_nsec);
	make_base();
	{
		int fd = open(path, O_RDONLY);

		ck_assert_int_eq(read(fd, now, SIZE), SIZE);
		close(fd);
	}
	ck_assert_int_eq(memcmp(now, model, SIZE), 0);
	teardown();
}
END_TEST

/* What only means "try again" is tried again, for tables too. */
START_TEST(a_result_that_means_again_is_tried_again)
{
	for (int at = 1; at < 20; at++) {
		setup();
		make(path, "qcow2", NULL, 512);
		work("format=qcow2", LOOP_EPOLL, 300);
		through_ring = true;
		failing = at;
		failing_kind = OP_READV;
		fail_with = -EAGAIN;
		work("format=qcow2", LOOP_EPOLL, 300);
		ck_assert_int_eq(failing, 0);
		ck_assert_uint_eq(failures, 0);
		fail_with = 0;
		failing_kind = -1;
		through_ring = false;
		check_image("qcow2", true);
		teardown();
	}
}
END_TEST

/* One call of the ring or a worker fails, each in turn: the request that needed it fails, and no metadata is lost. */
START_TEST(a_failed_call_never_corrupts)
{
	static const int errors[] = { -EIO, -ENOSPC };
	const char *const *f = image_formats();

	for (; *f; f++) {
		if (!here(*f) || !strcmp(*f, "raw"))
			continue;
		for (int at = 1; at < 120; at += 7) {
			setup();
			make(path, *f, NULL, 0);
			failing = at;
			fail_with = errors[at % 2];
			{
				char keys[60];

				snprintf(keys, sizeof(keys), "format=%s", *f);
				work(keys, LOOP_EPOLL, 200);
			}
			fail_with = failing = 0;
			check_image(*f, false);
			teardown();
		}
	}
}
END_TEST

/* What a drained disk leaves on the loop would come when the disk is gone. */
START_TEST(a_drained_disk_leaves_no_timer)
{
	setup();
	make(path, "qcow2", NULL, 0);
	open_disk("format=qcow2", LOOP_EPOLL);
	ck_assert_int_eq(one(BLK_WRITE, 0, 1 << 16), 0);
	ck_assert_int_eq(one(BLK_DISCARD, 0, 1 << 16), 0);
	ck_assert_int_eq(one(BLK_FLUSH, 0, 0), 0);      /* the space is given back by a plan that follows */
	loop_call(loop, drain, NULL);
	ck_assert_uint_eq(disk->tidy.slot, 0);
	ck_assert_int_eq(one(BLK_WRITE, 0, 1 << 16), 0);
	ck_assert_int_eq(one(BLK_DISCARD, 0, 1 << 16), 0);
	slot[1].r = (struct blk_req){ .op = BLK_FLUSH, .done = one_done };
	loop_call(loop, submit_and_drain, &slot[1]);
	sem_wait(&all_done);
	ck_assert_uint_eq(disk->tidy.slot, 0);
	close_disk();
	check_image("qcow2", false);
	teardown();
}
END_TEST

/* A guest may flush what it can only read; the format then has no metadata to write. */
START_TEST(an_image_that_is_only_read_can_be_flushed)
{
	static const char text[] = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n"
		"RW 8192 FLAT \"disk-flat.vmdk\" 0\n";
	int fd;

	setup();
	snprintf(path, sizeof(path), "%s/disk.vmdk", dir);
	snprintf(base, sizeof(base), "%s/disk-flat.vmdk", dir);
	make_base();
	fd = open(path, O_WRONLY | O_CREAT, 0600);
	ck_assert_int_eq(write(fd, text, sizeof(text) - 1), sizeof(text) - 1);
	close(fd);
	open_disk("format=vmdk,ro", LOOP_EPOLL);
	ck_assert_int_eq(one(BLK_FLUSH, 0, 0), 0);
	ck_assert_int_eq(one(BLK_READ, 1 << 16, 4096), 0);
	ck_assert_int_eq(memcmp(slot[0].data, model + (1 << 16), 4096), 0);
	close_disk();
	teardown();
}
END_TEST

/* The map of what was written before it was found corrupt stays in memory: no flush may say that it is safe. */
START_TEST(a_corrupt_image_cannot_be_flushed)
{
	setup();
	make(path, "qcow2", NULL, 0);
	open_disk("format=qcow2", LOOP_EPOLL);
	ck_assert_int_eq(one(BLK_WRITE, 0, 4096), 0);
	disk->image->corrupt = true;
	ck_assert_int_eq(one(BLK_FLUSH, 0, 0), -EIO);
	ck_assert_int_eq(one(BLK_READ, 0, 4096), 0);
	close_disk();
	teardown();
}
END_TEST

static void plan_now(void *arg)
{
	(void)arg;
	disk->tidy.fn(&disk->tidy);
	disk_drain(disk);
}

/* The host says only once that it lost data: whoever hears it, the guest's next flush must fail. */
START_TEST(a_sync_that_failed_fails_every_later_flush)
{
	setup();
	make(path, "qcow2", NULL, 0);
	open_disk("format=qcow2", LOOP_EPOLL);
	ck_assert_int_eq(one(BLK_WRITE, 0, 4096), 0);
	failing = 1;
	fail_with = -ENOSPC;                            /* metadata is kept: this one may be asked again */
	ck_assert_int_eq(one(BLK_FLUSH, 0, 0), -ENOSPC);
	ck_assert_int_eq(one(BLK_FLUSH, 0, 0), 0);
	ck_assert_int_eq(one(BLK_WRITE, 1 << 20, 4096), 0);
	ck_assert_int_eq(one(BLK_DISCARD, 0, 1 << 16), 0);
	sync_error = -EIO;
	loop_call(loop, plan_now, NULL);                /* no flush, only a plan to give space back */
	ck_assert_int_eq(sync_error, 0);
	ck_assert_int_eq(one(BLK_FLUSH, 0, 0), -EIO);
	ck_assert_int_eq(one(BLK_FLUSH, 0, 0), -EIO);
	close_disk();
	check_image("qcow2", false);
	teardown();
}
END_TEST

/* An entry of a map may point far behind the end of the file: that must not take the host's space. */
START_TEST(a_file_that_grows_far_grows_by_a_hole)
{
	struct stat st;

	setup();
	make(path, "qcow2", NULL, 0);
	open_disk("format=qcow2", LOOP_EPOLL);
	ck_assert_int_eq(file_grow(&disk->image->file, 1ull << 30), 0);
	ck_assert_int_eq(stat(path, &st), 0);
	ck_assert_int_eq(st.st_size, 1ll << 30);
	ck_assert_int_lt(st.st_blocks, (16 << 20) / 512);
	close_disk();
	teardown();
}
END_TEST

static void submit_all(void *arg)
{
	for (unsigned k = 0; k < DEPTH; k++)
		disk_submit(disk, &slot[k].r);
	*(size_t *)arg = disk->z_bytes;
}

/* Each takes a buffer of two clusters: not all of them may have theirs at once, and all are answered. */
START_TEST(compressed_clusters_take_turns_for_memory)
{
	struct image_create c = { .format = "qcow2", .size = DEPTH * (2ull << 20), .cluster = 2u << 20 };
	struct image_how how = { .format = "qcow2" };
	auto_free uint8_t *cluster = malloc(c.cluster);
	struct image *i;
	size_t bytes;

	setup();
	ck_assert_msg(!image_create(path, &c, &err), "%s", err.msg);
	ck_assert_msg(!image_open(&i, path, &how, &err), "%s", err.msg);
	for (unsigned k = 0; k < DEPTH; k++) {
		memset(cluster, (int)k + 1, c.cluster);
		ck_assert_int_eq(image_write_compressed(i, cluster, (uint64_t)k * c.cluster), 0);
	}
	image_close(i);
	open_disk("format=qcow2", LOOP_EPOLL);
	for (unsigned k = 0; k < DEPTH; k++) {
		slot[k].iov[0] = (struct iovec){ slot[k].data, 512 };
		slot[k].r = (struct blk_req){ .op = BLK_READ, .off = (uint64_t)k * c.cluster, .len = 512,
			.iov = slot[k].iov, .cnt = 1, .done = one_done };
	}
	loop_call(loop, submit_all, &bytes);
	ck_assert_uint_le(bytes, 32u << 20);
	for (unsigned k = 0; k < DEPTH; k++)
		sem_wait(&all_done);
	for (unsigned k = 0; k < DEPTH; k++)
		ck_assert(!slot[k].err && slot[k].data[0] == k + 1 && slot[k].data[511] == k + 1);
	ck_assert_uint_eq(disk->z_bytes, 0);
	close_disk();
	teardown();
}
END_TEST

static void submit_two(void *arg)
{
	(void)arg;
	disk_submit(disk, &slot[0].r);
	disk_submit(disk, &slot[1].r);
}

static struct blk_req *_Atomic first_done;

static void note_first(struct blk_req *r, int error)
{
	if (!first_done)
		first_done = r;
	one_done(r, error);
}

/* A request of very many pieces, all of them at hand, does not keep the loop from others. */
START_TEST(a_request_in_many_pieces_lets_others_through)
{
	setup();
	make(path, "qcow2", NULL, 512);
	open_disk("format=qcow2", LOOP_EPOLL);
	for (uint64_t k = 0; k < 128; k++)      /* every other, then those between */
		ck_assert_int_eq(one(BLK_WRITE, (k * 2 % 128 + k / 64) * 512, 512), 0);
	first_done = NULL;
	for (unsigned k = 0; k < 2; k++) {
		slot[k].iov[0] = (struct iovec){ slot[k].data, k ? 512 : 65536 };
		slot[k].r = (struct blk_req){ .op = BLK_READ, .len = k ? 512 : 65536, .iov = slot[k].iov, .cnt = 1,
			.done = note_first };
	}
	loop_call(loop, submit_two, NULL);
	sem_wait(&all_done);
	sem_wait(&all_done);
	ck_assert_ptr_eq(first_done, &slot[1].r);
	close_disk();
	check_image("qcow2", false);
	teardown();
}
END_TEST

UNIT_MAIN("request", every_format_keeps_what_was_written, what_is_missing_comes_from_the_backing_image,
	thrown_away_writes_leave_the_file_alone, a_result_that_means_again_is_tried_again,
	a_failed_call_never_corrupts, a_drained_disk_leaves_no_timer, an_image_that_is_only_read_can_be_flushed,
	a_corrupt_image_cannot_be_flushed, a_sync_that_failed_fails_every_later_flush,
	a_file_that_grows_far_grows_by_a_hole, compressed_clusters_take_turns_for_memory,
	a_request_in_many_pieces_lets_others_through)
