/* virtio-blk against the mock driver, on real files. */
#include <endian.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "mock_driver.h"
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/vm.h"

#define SECTORS 2048u
#define F(bit)  (1ull << (bit))
#define ALL     (~0ull)

extern const struct device_class blk_class;

static struct mock *m;
static char path[64];
static gpa_t data_at, status_at;

/* ---- set-up ---- */

static void fill_pattern(int fd)
{
	uint8_t s[512];

	for (unsigned i = 0; i < SECTORS; i++) {
		memset(s, (int)(i % 251), sizeof(s));
		ck_assert_int_eq(pwrite(fd, s, sizeof(s), i * 512), 512);
	}
}

static void start_on(const char *dir, const char *keys, uint64_t want, enum loop_engine engine)
{
	char args[400];
	int fd;

	snprintf(path, sizeof(path), "%s/vmm-blk-XXXXXX", dir);
	fd = mkstemp(path);
	ck_assert_int_ge(fd, 0);
	fill_pattern(fd);
	close(fd);
	snprintf(args, sizeof(args), "%s%s", path, keys);
	m = mock_new(engine);
	mock_create(m, &blk_class, args);
	mock_init(m, want);
	data_at = mock_alloc(m, 1 << 20);
	status_at = mock_alloc(m, 64);
}

static void start(const char *keys)
{
	start_on("/tmp", keys, ALL, LOOP_AUTO);
}

static void stop(void)
{
	mock_free(m);
	unlink(path);
}

static gpa_t header(uint32_t type, uint64_t sector)
{
	gpa_t at = mock_alloc(m, sizeof(struct virtio_blk_outhdr));

	*(struct virtio_blk_outhdr *)mock_at(m, at, sizeof(struct virtio_blk_outhdr)) =
		(struct virtio_blk_outhdr){ .type = htole32(type), .sector = htole64(sector) };
	return at;
}

static uint8_t status(void)
{
	return *(uint8_t *)mock_at(m, status_at, 1);
}

static uint8_t *data(void)
{
	return mock_at(m, data_at, 1 << 20);
}

static uint32_t used_len;

/* One request with len bytes of data; its status. */
static uint8_t request(uint32_t type, uint64_t sector, uint32_t len)
{
	bool in = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
	struct mock_buf b[4] = { { header(type, sector), 16 } };
	unsigned n = 1;

	if (len)
		b[n++] = (struct mock_buf){ data_at, len };
	b[n++] = (struct mock_buf){ status_at, 1 };
	*(uint8_t *)mock_at(m, status_at, 1) = 0xee;
	used_len = mock_request(m, 0, b, len && !in ? 2 : 1, b + (len && !in ? 2 : 1), len && in ? 2 : 1);
	return status();
}

static uint8_t range_request(uint32_t type, uint64_t sector, uint32_t n, uint32_t flags)
{
	*(struct virtio_blk_discard_write_zeroes *)data() = (struct virtio_blk_discard_write_zeroes){
		.sector = htole64(sector), .num_sectors = htole32(n), .flags = htole32(flags) };
	return request(type, 0, 16);
}

static void expect_break(const struct mock_buf *b, unsigned nr_out, unsigned nr_in)
{
	mock_add(m, 0, b, nr_out, b + nr_out, nr_in);
	mock_kick(m, 0);
	mock_wait_broken(m);
	mock_init(m, ALL);      /* and a reset brings it back */
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 1, 512), VIRTIO_BLK_S_OK);
}

/* ---- ordinary work ---- */

START_TEST(test_reads_and_writes_reach_the_file)
{
	static const char *const dirs[] = { "/tmp", "/dev/shm" };

	for (unsigned i = 0; i < 4; i++) {
		start_on(dirs[i % 2], "", ALL, i / 2 ? LOOP_EPOLL : LOOP_AUTO);
		ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 7, 1024), VIRTIO_BLK_S_OK);
		ck_assert_uint_eq(used_len, 1025);
		ck_assert_uint_eq(data()[0], 7);
		ck_assert_uint_eq(data()[1023], 8);
		memset(data(), 0xcd, 4096);
		ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, 16, 4096), VIRTIO_BLK_S_OK);
		ck_assert_uint_eq(used_len, 1);
		ck_assert_uint_eq(request(VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
		memset(data(), 0, 8192);
		ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 15, 8192), VIRTIO_BLK_S_OK);
		ck_assert_uint_eq(data()[511], 15);
		ck_assert_uint_eq(data()[512], 0xcd);
		ck_assert_uint_eq(data()[512 + 4095], 0xcd);
		ck_assert_uint_eq(data()[512 + 4096], 24);
		stop();
	}
}
END_TEST

START_TEST(test_configuration_describes_the_disk)
{
	uint64_t f;

	start(",queues=3,serial=abc");
	f = mock_offered(m);
	ck_assert(f & F(VIRTIO_BLK_F_FLUSH) && f & F(VIRTIO_BLK_F_MQ) && f & F(VIRTIO_BLK_F_SEG_MAX));
	ck_assert(f & F(VIRTIO_BLK_F_DISCARD) && f & F(VIRTIO_BLK_F_WRITE_ZEROES));
	ck_assert(!(f & F(VIRTIO_BLK_F_RO)));
	ck_assert_uint_eq(mock_config(m, offsetof(struct virtio_blk_config, capacity), 4), SECTORS);
	ck_assert_uint_eq(mock_config(m, offsetof(struct virtio_blk_config, blk_size), 4), 512);
	ck_assert_uint_eq(mock_config(m, offsetof(struct virtio_blk_config, seg_max), 4), 128);
	ck_assert_uint_eq(mock_config(m, offsetof(struct virtio_blk_config, num_queues), 2), 3);
	ck_assert_uint_eq(mock_config(m, offsetof(struct virtio_blk_config, wce), 1), 1);
	ck_assert_uint_eq(mock_device(m)->nr_queues, 3);
	stop();
	start(",ro");
	f = mock_offered(m);
	ck_assert(f & F(VIRTIO_BLK_F_RO));
	ck_assert(!(f & (F(VIRTIO_BLK_F_DISCARD) | F(VIRTIO_BLK_F_WRITE_ZEROES) | F(VIRTIO_BLK_F_MQ))));
	stop();
}
END_TEST

START_TEST(test_cache_mode_follows_features_and_driver)
{
	unsigned wce = offsetof(struct virtio_blk_config, wce);

	start("");
	mock_config_write(m, wce, 1, 0);
	ck_assert_uint_eq(mock_config(m, wce, 1), 0);
	mock_config_write(m, wce, 1, 7);
	ck_assert_uint_eq(mock_config(m, wce, 1), 0);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_OK);
	mock_reset(m);
	ck_assert_uint_eq(mock_config(m, wce, 1), 1);
	mock_init(m, ALL & ~F(VIRTIO_BLK_F_FLUSH));     /* cannot flush: write-through */
	ck_assert_uint_eq(mock_config(m, wce, 1), 0);
	mock_init(m, ALL & ~F(VIRTIO_BLK_F_CONFIG_WCE));
	mock_config_write(m, wce, 1, 0);
	ck_assert_uint_eq(mock_config(m, wce, 1), 1);
	stop();
	start(",cache=writethrough");
	ck_assert_uint_eq(mock_config(m, wce, 1), 0);
	stop();
}
END_TEST

START_TEST(test_facts_count_what_was_done)
{
	struct facts *f = facts_new();
	char *text;

	start("");
	request(VIRTIO_BLK_T_IN, 0, 4096);
	request(VIRTIO_BLK_T_OUT, 0, 1024);
	request(VIRTIO_BLK_T_FLUSH, 0, 0);
	request(VIRTIO_BLK_T_IN, SECTORS, 512);
	mock_device(m)->ops->facts(mock_device(m), f);
	text = facts_text(f);
	ck_assert_ptr_nonnull(strstr(text, "\"bytes_read\":4096"));
	ck_assert_ptr_nonnull(strstr(text, "\"bytes_written\":1024"));
	ck_assert_ptr_nonnull(strstr(text, "\"reads\":1"));
	ck_assert_ptr_nonnull(strstr(text, "\"flushes\":1"));
	ck_assert_ptr_nonnull(strstr(text, "\"errors\":1"));
	free(text);
	facts_free(f);
	stop();
}
END_TEST

/* ---- the hostile rows ---- */

START_TEST(test_row35_sector_overflow_fails)
{
	start("");
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, UINT64_MAX, 512), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(used_len, 1);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, UINT64_MAX / 512, 1024), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, 1ull << 55, 512), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 1ull << 63, 4096), VIRTIO_BLK_S_IOERR);
	stop();
}
END_TEST

START_TEST(test_row36_past_the_end_or_odd_length_fails_and_writes_nothing)
{
	struct stat st;

	start("");
	memset(data(), 0xcd, 4096);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, SECTORS - 1, 1024), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, 0, 513), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 0, 1), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, SECTORS, 512), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, SECTORS - 1, 512), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(data()[0], (SECTORS - 1) % 251);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(data()[0], 0);
	ck_assert_int_eq(stat(path, &st), 0);
	ck_assert_int_eq(st.st_size, SECTORS * 512);
	stop();
}
END_TEST

START_TEST(test_row37_any_layout_is_read)
{
	struct mock_buf b[64];
	gpa_t h;
	unsigned n = 0;

	start("");
	/* Header in 16 pieces; data in odd pieces, the last of them with the status byte at its end. */
	h = header(VIRTIO_BLK_T_IN, 9);
	for (; n < 16; n++)
		b[n] = (struct mock_buf){ h + n, 1 };
	b[n++] = (struct mock_buf){ data_at, 1 };
	b[n++] = (struct mock_buf){ data_at + 1, 700 };
	b[n++] = (struct mock_buf){ data_at + 701, 1024 - 701 + 1 };
	ck_assert_uint_eq(mock_request(m, 0, b, 16, b + 16, 3), 1025);
	ck_assert_uint_eq(data()[0], 9);
	ck_assert_uint_eq(data()[1023], 10);
	ck_assert_uint_eq(data()[1024], VIRTIO_BLK_S_OK);
	/* Header and data in one. */
	h = mock_alloc(m, 16 + 512);
	memcpy(mock_at(m, h, 16), mock_at(m, header(VIRTIO_BLK_T_OUT, 3), 16), 16);
	memset(mock_at(m, h + 16, 512), 0x77, 512);
	b[0] = (struct mock_buf){ h, 16 + 512 };
	b[1] = (struct mock_buf){ status_at, 1 };
	ck_assert_uint_eq(mock_request(m, 0, b, 1, b + 1, 1), 1);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 3, 512), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(data()[511], 0x77);
	stop();
}
END_TEST

START_TEST(test_row37_more_segments_than_seg_max_fail)
{
	struct mock_buf b[140];
	unsigned n = 1;

	start("");
	b[0] = (struct mock_buf){ header(VIRTIO_BLK_T_IN, 0), 16 };
	for (; n <= 128; n++)
		b[n] = (struct mock_buf){ data_at + n * 512, 512 };
	b[n++] = (struct mock_buf){ status_at, 1 };
	ck_assert_uint_eq(mock_request(m, 0, b, 1, b + 1, n - 1), 128 * 512 + 1);
	ck_assert_uint_eq(status(), VIRTIO_BLK_S_OK);
	b[n - 1] = (struct mock_buf){ data_at, 512 };
	b[n++] = (struct mock_buf){ status_at, 1 };
	ck_assert_uint_eq(mock_request(m, 0, b, 1, b + 1, n - 1), 1);
	ck_assert_uint_eq(status(), VIRTIO_BLK_S_IOERR);
	stop();
}
END_TEST

START_TEST(test_row37_row38_no_place_for_a_status_breaks_the_device)
{
	struct mock_buf b[3];

	start("");
	b[0] = (struct mock_buf){ header(VIRTIO_BLK_T_IN, 0), 16 };
	b[1] = (struct mock_buf){ status_at, 1 };
	expect_break(b, 1, 0);
	expect_break(b, 2, 0);          /* a read-only one */
	b[0].len = 15;
	expect_break(b, 1, 1);          /* shorter than a header */
	expect_break(b + 1, 0, 1);      /* none at all */
	b[0].len = 16;
	b[1].at = MOCK_HOLE;
	expect_break(b, 1, 1);
	stop();
}
END_TEST

START_TEST(test_row38_flush_with_data_breaks_the_device)
{
	struct mock_buf b[3];

	start("");
	b[0] = (struct mock_buf){ header(VIRTIO_BLK_T_FLUSH, 0), 16 };
	b[1] = (struct mock_buf){ data_at, 512 };
	b[2] = (struct mock_buf){ status_at, 1 };
	expect_break(b, 2, 1);
	expect_break(b, 1, 2);
	stop();
}
END_TEST

START_TEST(test_row39_unknown_types_are_unsupported)
{
	static const uint32_t types[] = { 2, 3, 5, 9, 10, 14, 0x80000000u, UINT32_MAX };

	start("");
	for (unsigned i = 0; i < ARRAY_LEN(types); i++) {
		ck_assert_uint_eq(request(types[i], 0, 512), VIRTIO_BLK_S_UNSUPP);
		ck_assert_uint_eq(used_len, 1);
	}
	stop();
}
END_TEST

START_TEST(test_row39_id_is_cut_to_the_buffer)
{
	start(",serial=0123456789abcdefghij");
	memset(data(), 0xaa, 64);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_GET_ID, 0, 1), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(used_len, 2);
	ck_assert_uint_eq(data()[0], '0');
	ck_assert_uint_eq(data()[1], 0xaa);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_GET_ID, 0, 64), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(used_len, 21);
	ck_assert_int_eq(memcmp(data(), "0123456789abcdefghij", 20), 0);
	ck_assert_uint_eq(data()[20], 0xaa);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_GET_ID, 0, 0), VIRTIO_BLK_S_OK);
	stop();
}
END_TEST

START_TEST(test_row40_discard_and_write_zeroes_are_checked)
{
	start("");
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, 8, 8, 0), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 3, 2, 0), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 16, 16, 1), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, 8, 8, 1), VIRTIO_BLK_S_UNSUPP);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 2), VIRTIO_BLK_S_UNSUPP);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, SECTORS - 1, 2, 0), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, UINT64_MAX, 2, 0), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, 0, UINT32_MAX, 0), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1u << 20, 0), VIRTIO_BLK_S_IOERR);
	memset(data(), 0, 64);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_DISCARD, 0, 32), VIRTIO_BLK_S_IOERR);    /* two segments */
	ck_assert_uint_eq(request(VIRTIO_BLK_T_DISCARD, 0, 15), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 0), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 0, 64 * 512), VIRTIO_BLK_S_OK);
	for (unsigned i = 0; i < 64; i++)
		ck_assert_uint_eq(data()[i * 512], i == 3 || i == 4 || (i >= 8 && i < 32) ? 0 : i);
	mock_init(m, ALL & ~(F(VIRTIO_BLK_F_DISCARD) | F(VIRTIO_BLK_F_WRITE_ZEROES)));
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, 8, 8, 0), VIRTIO_BLK_S_UNSUPP);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 0), VIRTIO_BLK_S_UNSUPP);
	stop();
}
END_TEST

START_TEST(test_row41_write_to_a_readonly_disk_fails)
{
	start(",ro");
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), VIRTIO_BLK_S_UNSUPP);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 5, 512), VIRTIO_BLK_S_OK);
	stop();
}
END_TEST

/* A ring full of one-table requests of 1 MiB each; the status bytes. */
static gpa_t add_many(unsigned n, uint32_t type, uint32_t len)
{
	gpa_t st = mock_alloc(m, n);

	mock_indirect(m, true);
	memset(mock_at(m, st, n), 0xee, n);
	for (unsigned i = 0; i < n; i++) {
		struct mock_buf b[3] = { { header(type, 0), 16 }, { data_at, len }, { st + i, 1 } };

		mock_add(m, 0, b, type == VIRTIO_BLK_T_OUT ? 2 : 1, b + (type == VIRTIO_BLK_T_OUT ? 2 : 1),
			type == VIRTIO_BLK_T_OUT ? 1 : 2);
	}
	mock_indirect(m, false);
	return st;
}

static void wait_many(unsigned n, gpa_t st)
{
	bool seen[VIRTQ_MAX] = { false };
	uint16_t head;

	for (unsigned i = 0; i < n; i++) {
		ck_assert(mock_wait(m, 0, &head, NULL));
		ck_assert(!seen[head]);
		seen[head] = true;
	}
	for (unsigned i = 0; i < n; i++)
		ck_assert_uint_eq(((uint8_t *)mock_at(m, st, n))[i], VIRTIO_BLK_S_OK);
	ck_assert(!mock_used(m, 0, NULL, NULL));
}

START_TEST(test_row42_row43_full_ring_of_large_requests_completes_each_once)
{
	for (unsigned i = 0; i < 2; i++) {
		gpa_t st;

		start_on("/tmp", i ? ",cache=unsafe" : "", ALL, i ? LOOP_EPOLL : LOOP_AUTO);
		st = add_many(256, VIRTIO_BLK_T_IN, 1 << 20);
		mock_kick(m, 0);
		wait_many(256, st);
		memset(data(), 1, 65536);
		st = add_many(256, VIRTIO_BLK_T_OUT, 65536);
		mock_kick(m, 0);
		wait_many(256, st);
		stop();
	}
}
END_TEST

START_TEST(test_row24_reset_with_requests_in_flight_leaves_no_stray_write)
{
	for (unsigned i = 0; i < 2; i++) {
		gpa_t st;

		start_on("/tmp", "", ALL, i ? LOOP_EPOLL : LOOP_AUTO);
		add_many(64, VIRTIO_BLK_T_OUT, 65536);
		st = add_many(64, VIRTIO_BLK_T_IN, 512 << 10);
		mock_kick(m, 0);
		mock_reset(m);
		memset(data(), 0x5a, 1 << 20);
		memset(mock_at(m, st, 64), 0x5a, 64);
		mock_init(m, ALL);
		ck_assert_uint_eq(request(VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
		for (unsigned k = 0; k < 1 << 20; k++)
			ck_assert_uint_eq(data()[k], 0x5a);
		for (unsigned k = 0; k < 64; k++)
			ck_assert_uint_eq(((uint8_t *)mock_at(m, st, 64))[k], 0x5a);
		ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_OK);
		stop();
	}
}
END_TEST

START_TEST(test_options_are_refused_with_words)
{
	struct error err;
	char args[100];

	start("");
	snprintf(args, sizeof(args), "%s", path);
	ck_assert_int_eq(mock_try_create(m, &blk_class, args, &err), -EBUSY);
	snprintf(args, sizeof(args), "%s,ro,queues=17", path);
	unlink(path);
	ck_assert_int_eq(mock_try_create(m, &blk_class, args, &err), -ENOENT);
	stop();
	start(",ro");
	snprintf(args, sizeof(args), "%s,ro,queues=17", path);
	ck_assert_int_eq(mock_try_create(m, &blk_class, args, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "queues=17: must be 1 to 16"));
	snprintf(args, sizeof(args), "%s,ro,serial=0123456789abcdefghijk", path);
	ck_assert_int_eq(mock_try_create(m, &blk_class, args, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "at most 20 characters"));
	snprintf(args, sizeof(args), "%s,ro,colour=red", path);
	ck_assert_int_eq(mock_try_create(m, &blk_class, args, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "unknown key 'colour'"));
	stop();
}
END_TEST

/* ---- what the keys shape ---- */

static uint64_t config(size_t off, unsigned size)
{
	return mock_config(m, (unsigned)off, size);
}
#define CONFIG(field) \
	config(offsetof(struct virtio_blk_config, field), sizeof(((struct virtio_blk_config *)0)->field))

START_TEST(test_keys_shape_the_configuration)
{
	start(",logical=1024,physical=8K,align_offset=2K,min_io=16K,opt_io=1M,seg_max=20,size_max=64K"
	      ",discard_max=1M,discard_seg=3,discard_align=8K,zeroes_max=2M,zeroes_seg=4,queues=2,queue_size=1024");
	ck_assert(mock_offered(m) & F(VIRTIO_BLK_F_SIZE_MAX));
	ck_assert_uint_eq(CONFIG(capacity) & UINT32_MAX, SECTORS);
	ck_assert_uint_eq(CONFIG(blk_size), 1024);
	ck_assert_uint_eq(CONFIG(physical_block_exp), 3);
	ck_assert_uint_eq(CONFIG(alignment_offset), 2);
	ck_assert_uint_eq(CONFIG(min_io_size), 16);
	ck_assert_uint_eq(CONFIG(opt_io_size), 1024);
	ck_assert_uint_eq(CONFIG(seg_max), 20);
	ck_assert_uint_eq(CONFIG(size_max), 65536);
	ck_assert_uint_eq(CONFIG(max_discard_sectors), 2048);
	ck_assert_uint_eq(CONFIG(max_discard_seg), 3);
	ck_assert_uint_eq(CONFIG(discard_sector_alignment), 16);
	ck_assert_uint_eq(CONFIG(max_write_zeroes_sectors), 4096);
	ck_assert_uint_eq(CONFIG(max_write_zeroes_seg), 4);
	ck_assert_uint_eq(CONFIG(write_zeroes_may_unmap), 1);
	ck_assert_uint_eq(CONFIG(num_queues), 2);
	ck_assert_uint_eq(mock_ring(m, 1)->num, 1024);
	stop();
	start(",discard=off,queue_size=16");
	ck_assert(!(mock_offered(m) & (F(VIRTIO_BLK_F_SIZE_MAX) | F(VIRTIO_BLK_F_DISCARD))));
	ck_assert_uint_eq(CONFIG(max_discard_sectors), 0);
	ck_assert_uint_eq(CONFIG(write_zeroes_may_unmap), 0);
	ck_assert_uint_eq(CONFIG(seg_max), 14);         /* no chain is longer than its queue */
	stop();
}
END_TEST

START_TEST(test_parts_of_logical_blocks_are_refused)
{
	start(",logical=4096,discard_seg=2");
	ck_assert_uint_eq(CONFIG(physical_block_exp), 0);
	memset(data(), 0xcd, 8192);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, 8, 512), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, 1, 4096), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 4, 4096), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, 8, 4, 0), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 4, 8, 0), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 8, 8192), VIRTIO_BLK_S_OK);
	for (unsigned i = 0; i < 16; i++)
		ck_assert_uint_eq(data()[i * 512], 8 + i);      /* none of them changed a thing */
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, 16, 8192), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 0), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_GET_ID, 0, 20), VIRTIO_BLK_S_OK);
	stop();
}
END_TEST

START_TEST(test_segment_limits_hold)
{
	struct mock_buf b[6];

	start(",seg_max=3,size_max=4K");
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 0, 4608), VIRTIO_BLK_S_IOERR);
	b[0] = (struct mock_buf){ header(VIRTIO_BLK_T_IN, 0), 16 };
	for (unsigned i = 1; i < 5; i++)
		b[i] = (struct mock_buf){ data_at + i * 4096, 512 };
	b[5] = b[4];
	b[4] = (struct mock_buf){ status_at, 1 };
	ck_assert_uint_eq(mock_request(m, 0, b, 1, b + 1, 4), 3 * 512 + 1);
	ck_assert_uint_eq(status(), VIRTIO_BLK_S_OK);
	b[4] = b[5];
	b[5] = (struct mock_buf){ status_at, 1 };
	ck_assert_uint_eq(mock_request(m, 0, b, 1, b + 1, 5), 1);
	ck_assert_uint_eq(status(), VIRTIO_BLK_S_IOERR);
	stop();
}
END_TEST

/* Discard or write zeroes of several segments, { sector, sectors } each. */
static uint8_t ranges_request(uint32_t type, const uint32_t (*seg)[2], unsigned n, uint32_t flags)
{
	struct virtio_blk_discard_write_zeroes *at = (void *)data();

	for (unsigned i = 0; i < n; i++)
		at[i] = (struct virtio_blk_discard_write_zeroes){ .sector = htole64(seg[i][0]),
			.num_sectors = htole32(seg[i][1]), .flags = htole32(flags) };
	return request(type, 0, n * (uint32_t)sizeof(*at));
}

START_TEST(test_ranges_of_several_segments)
{
	static const uint32_t good[4][2] = { { 8, 8 }, { 100, 1 }, { 40, 0 }, { 32, 2 } };
	static const uint32_t bad[3][2] = { { 64, 8 }, { 48, 8 }, { SECTORS - 1, 2 } };
	static const uint32_t large[2][2] = { { 64, 8 }, { 64, 2049 } };
	struct facts *f = facts_new();
	uint32_t many[128][2];
	char *text;

	for (unsigned i = 0; i < 4; i++) {
		start_on(i / 2 ? "/dev/shm" : "/tmp", ",zeroes_seg=128,zeroes_max=1M", ALL,
			i % 2 ? LOOP_EPOLL : LOOP_AUTO);
		ck_assert_uint_eq(ranges_request(VIRTIO_BLK_T_WRITE_ZEROES, good, 4, i % 2), VIRTIO_BLK_S_OK);
		ck_assert_uint_eq(ranges_request(VIRTIO_BLK_T_WRITE_ZEROES, bad, 3, 0), VIRTIO_BLK_S_IOERR);
		ck_assert_uint_eq(ranges_request(VIRTIO_BLK_T_WRITE_ZEROES, bad, 2, 2), VIRTIO_BLK_S_UNSUPP);
		ck_assert_uint_eq(ranges_request(VIRTIO_BLK_T_WRITE_ZEROES, large, 2, 0), VIRTIO_BLK_S_IOERR);
		ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, 0, 128 * 512), VIRTIO_BLK_S_OK);
		for (unsigned k = 0; k < 128; k++)
			ck_assert_uint_eq(data()[k * 512],
				(k >= 8 && k < 16) || k == 100 || k == 32 || k == 33 ? 0 : k);
		memset(many, 0, sizeof(many));          /* of no sectors: all done on the spot */
		ck_assert_uint_eq(ranges_request(VIRTIO_BLK_T_WRITE_ZEROES, many, 128, 0), VIRTIO_BLK_S_OK);
		ck_assert_uint_eq(ranges_request(VIRTIO_BLK_T_DISCARD, good, 2, 0), VIRTIO_BLK_S_IOERR);
		if (!i) {
			mock_device(m)->ops->facts(mock_device(m), f);
			text = facts_text(f);
			ck_assert_ptr_nonnull(strstr(text, "\"discards\":2"));
			free(text);
		}
		stop();
	}
	facts_free(f);
}
END_TEST

START_TEST(test_a_long_queue_takes_as_many_requests)
{
	gpa_t st;

	start(",queue_size=1024");
	st = add_many(1024, VIRTIO_BLK_T_IN, 4096);
	mock_kick(m, 0);
	wait_many(1024, st);
	stop();
}
END_TEST

START_TEST(test_a_growing_file_grows_the_disk)
{
	start(",resize=auto,logical=1K");
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, SECTORS, 1024), VIRTIO_BLK_S_IOERR);
	ck_assert_int_eq(truncate(path, (SECTORS + 7) * 512), 0);
	mock_wait_config(m);
	ck_assert(!(mock_status(m) & VIRTIO_CONFIG_S_NEEDS_RESET));
	ck_assert_uint_eq(CONFIG(capacity) & UINT32_MAX, SECTORS + 6);  /* whole blocks */
	memset(data(), 0x77, 1024);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, SECTORS + 4, 1024), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_OUT, SECTORS + 8, 1024), VIRTIO_BLK_S_IOERR);
	ck_assert_int_eq(truncate(path, SECTORS * 512), 0);
	usleep(1200000);
	ck_assert_uint_eq(CONFIG(capacity) & UINT32_MAX, SECTORS + 6);
	ck_assert_uint_eq(request(VIRTIO_BLK_T_IN, SECTORS - 2, 1024), VIRTIO_BLK_S_OK);
	mock_reset(m);          /* nobody looks between two drivers */
	ck_assert_int_eq(truncate(path, (SECTORS + 100) * 512), 0);
	mock_init(m, ALL);
	mock_wait_config(m);
	ck_assert_uint_eq(CONFIG(capacity) & UINT32_MAX, SECTORS + 100);
	stop();
}
END_TEST

START_TEST(test_shapes_are_refused_with_words)
{
	static const struct {
		const char *keys, *words;
	} bad[] = {
		{ "logical=256", "must be 512 to 4096" },
		{ "logical=1536", "must be a power of two" },
		{ "logical=4096,physical=512", "must be 4096 to 65536" },
		{ "physical=4096,align_offset=100", "must be a multiple of 512" },
		{ "physical=4096,align_offset=4096", "must be 0 to 3584" },
		{ "min_io=513", "must be a multiple of 512" },
		{ "queue_size=3", "must be a power of two" },
		{ "queue_size=2048", "must be 2 to 1024" },
		{ "queue_size=8,seg_max=7", "must be 1 to 6" },
		{ "seg_max=129", "must be 1 to 128" },
		{ "discard_max=4T", "must be 512 to" },
		{ "discard_seg=0", "must be 1 to 128" },
		{ "discard=off,discard_max=1M", "discard_max: this disk has no discard" },
		{ "resize=maybe", "expected off or auto" },
		{ "wwn=1", "unknown key 'wwn'" },
	};
	struct error err;
	char args[100];

	start(",ro");
	snprintf(args, sizeof(args), "%s,ro,zeroes_max=1M", path);
	ck_assert_int_eq(mock_try_create(m, &blk_class, args, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "zeroes_max: this disk is read-only"));
	mock_free(m);
	m = mock_new(LOOP_AUTO);
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		snprintf(args, sizeof(args), "%s,%s", path, bad[i].keys);
		ck_assert_int_eq(mock_try_create(m, &blk_class, args, &err), -EINVAL);
		ck_assert_msg(strstr(err.msg, bad[i].words) != NULL, "%s: %s", bad[i].keys, err.msg);
	}
	ck_assert_int_eq(truncate(path, SECTORS * 512 - 512), 0);
	snprintf(args, sizeof(args), "%s,logical=1024", path);
	ck_assert_int_eq(mock_try_create(m, &blk_class, args, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "are not whole blocks of that"));
	stop();
}
END_TEST

UNIT_MAIN("blk", test_reads_and_writes_reach_the_file, test_configuration_describes_the_disk,
	test_cache_mode_follows_features_and_driver, test_facts_count_what_was_done,
	test_row35_sector_overflow_fails,
	test_row36_past_the_end_or_odd_length_fails_and_writes_nothing, test_row37_any_layout_is_read,
	test_row37_more_segments_than_seg_max_fail,
	test_row37_row38_no_place_for_a_status_breaks_the_device,
	test_row38_flush_with_data_breaks_the_device, test_row39_unknown_types_are_unsupported,
	test_row39_id_is_cut_to_the_buffer, test_row40_discard_and_write_zeroes_are_checked,
	test_row41_write_to_a_readonly_disk_fails,
	test_row42_row43_full_ring_of_large_requests_completes_each_once,
	test_row24_reset_with_requests_in_flight_leaves_no_stray_write,
	test_options_are_refused_with_words, test_keys_shape_the_configuration,
	test_parts_of_logical_blocks_are_refused, test_segment_limits_hold, test_ranges_of_several_segments,
	test_a_long_queue_takes_as_many_requests, test_a_growing_file_grows_the_disk,
	test_shapes_are_refused_with_words)
