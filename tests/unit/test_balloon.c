/* virtio-balloon under the mock driver: what is given back reads as zero afterwards, nothing else does. */
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "mock_driver.h"
#include "unit.h"
#include "vmm/error.h"
#include "vmm/sandbox.h"

extern const struct device_class balloon_class;

#define PAGE      4096u
#define INFLATE   0
#define DEFLATE   1
#define REPORTING 2

static struct mock *m;

static void begin(const char *args)
{
	m = mock_new(LOOP_AUTO);
	mock_create(m, &balloon_class, args);
	mock_init(m, ~0ull);
}

/* Fill pages with ones; their first page's number. */
static uint32_t dirty(gpa_t at, unsigned pages)
{
	memset(mock_at(m, at, pages * PAGE), 1, pages * PAGE);
	return (uint32_t)(at / PAGE);
}

static bool is(gpa_t at, uint8_t value)
{
	const uint8_t *p = mock_at(m, at, PAGE);

	return p[0] == value && !memcmp(p, p + 1, PAGE - 1);
}

static struct mock_buf pfns(const uint32_t *list, unsigned n)
{
	struct mock_buf b = { mock_alloc(m, 4 * n), 4 * n };

	memcpy(mock_at(m, b.at, 4 * n), list, 4 * n);
	return b;
}

static uint64_t resident(void)
{
	struct stat st;

	ck_assert_int_eq(fstat(mock_vm(m)->mem.fd, &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

START_TEST(test_inflate_gives_pages_back_to_the_host)
{
	gpa_t at;
	uint32_t p, list[6];
	uint64_t before;
	struct mock_buf out;

	begin("");
	at = mock_alloc(m, 16 * PAGE);
	p = dirty(at, 16);
	/* any order, one of them twice */
	list[0] = p + 7, list[1] = p + 2, list[2] = p + 3, list[3] = p + 7, list[4] = p + 4, list[5] = p + 15;
	out = pfns(list, 6);
	before = resident();
	ck_assert_uint_eq(mock_request(m, INFLATE, &out, 1, NULL, 0), 0);
	for (unsigned i = 0; i < 16; i++)
		ck_assert_int_eq(is(at + i * PAGE, 0), i == 2 || i == 3 || i == 4 || i == 7 || i == 15);
	mock_reset(m);
	/* looking at them made zero pages of them: punch once more, and look no more */
	mock_init(m, ~0ull);
	ck_assert_uint_eq(mock_request(m, INFLATE, &out, 1, NULL, 0), 0);
	ck_assert_uint_le(resident(), before - 5 * PAGE + 2 * PAGE);
	/* taken out again they are ordinary memory */
	ck_assert_uint_eq(mock_request(m, DEFLATE, &out, 1, NULL, 0), 0);
	dirty(at, 16);
	ck_assert(is(at + 7 * PAGE, 1));
	mock_free(m);
}
END_TEST

START_TEST(test_row59_pages_outside_ram_are_skipped)
{
	gpa_t at;
	uint32_t list[7];
	struct mock_buf out;

	begin("");
	at = mock_alloc(m, 4 * PAGE);
	list[0] = dirty(at, 4) + 1;
	list[1] = MOCK_RAM / PAGE;
	list[2] = 0xfee00;
	list[3] = 0xffffffff;
	list[4] = 0xfffffffe;
	list[5] = 0xffffffff;
	list[6] = list[0];
	out = pfns(list, 7);
	ck_assert_uint_eq(mock_request(m, INFLATE, &out, 1, NULL, 0), 0);
	ck_assert(is(at, 1) && is(at + PAGE, 0) && is(at + 2 * PAGE, 1));
	ck_assert_uint_eq(mock_status(m) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
	mock_free(m);
}
END_TEST

START_TEST(test_row59_an_endless_list_is_capped_and_odd_bytes_ignored)
{
	gpa_t at;
	struct mock_buf out[2];
	uint32_t *list;

	begin("");
	at = mock_alloc(m, PAGE);
	dirty(at, 1);
	/* 1 MiB of numbers, the dirty page's number only past the cap */
	out[0] = (struct mock_buf){ mock_alloc(m, 1 << 20), 1 << 20 };
	out[1] = (struct mock_buf){ mock_alloc(m, 3), 3 };
	list = mock_at(m, out[0].at, 1 << 20);
	for (unsigned i = 0; i < (1 << 20) / 4; i++)
		list[i] = i < 4096 ? 0xffffffff : (uint32_t)(at / PAGE);
	ck_assert_uint_eq(mock_request(m, INFLATE, out, 2, NULL, 0), 0);
	ck_assert(is(at, 1));
	ck_assert_uint_eq(mock_request(m, INFLATE, &out[1], 1, NULL, 0), 0);
	mock_free(m);
}
END_TEST

START_TEST(test_reported_ranges_are_given_back_in_whole_pages)
{
	gpa_t at;
	struct mock_buf in[3];

	begin("");
	at = mock_alloc(m, 16 * PAGE);
	dirty(at, 16);
	in[0] = (struct mock_buf){ at, 2 * PAGE };
	in[1] = (struct mock_buf){ at + 4 * PAGE + 1, 3 * PAGE };       /* two whole pages of it */
	in[2] = (struct mock_buf){ at + 10 * PAGE, PAGE - 1 };          /* none */
	ck_assert_uint_eq(mock_request(m, REPORTING, NULL, 0, in, 3), 0);
	for (unsigned i = 0; i < 16; i++)
		ck_assert_int_eq(is(at + i * PAGE, 0), i == 0 || i == 1 || i == 5 || i == 6);
	mock_free(m);
}
END_TEST

START_TEST(test_target_and_actual_in_config)
{
	begin("target=4M");
	ck_assert_uint_eq(mock_config(m, 0, 4), (MOCK_RAM - (4 << 20)) / PAGE);
	mock_config_write(m, 4, 4, 77);
	ck_assert_uint_eq(mock_config(m, 4, 4), 77);
	mock_config_write(m, 0, 4, 5);          /* the target is ours */
	ck_assert_uint_eq(mock_config(m, 0, 4), (MOCK_RAM - (4 << 20)) / PAGE);
	mock_config_write(m, 0, 8, ~0ull);
	ck_assert_uint_eq(mock_config(m, 4, 4), 77);
	mock_free(m);
}
END_TEST

START_TEST(test_target_beyond_ram_is_refused)
{
	struct error err;

	m = mock_new(LOOP_AUTO);
	ck_assert_int_lt(mock_try_create(m, &balloon_class, "target=1G", &err), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "target"));
	mock_free(m);
}
END_TEST

START_TEST(test_reset_waits_for_the_worker)
{
	struct mock_buf in;

	begin("");
	in = (struct mock_buf){ mock_alloc(m, 8 << 20), 8 << 20 };
	for (unsigned i = 0; i < 200; i++) {
		mock_add(m, REPORTING, NULL, 0, &in, 1);
		mock_kick(m, REPORTING);
		mock_init(m, ~0ull);
		/* what is written after the reset stays */
		memset(mock_at(m, in.at, PAGE), 1, PAGE);
		ck_assert(is(in.at, 1));
	}
	mock_free(m);
}
END_TEST

/* In a child: as in a running VM, where a call that the filter does not know is the end. */
static int inflate_shut_in(void)
{
	enum { n = 4096 };
	struct error err = { 0 };
	struct mock_buf out;
	gpa_t at;
	uint32_t p, list[n];

	if (sandbox_prepare(SANITIZED ? SANDBOX_LOG : SANDBOX_ON, &err))  /* as in test_sandbox.c */
		return 99;
	begin("");
	at = mock_alloc(m, 1024 * PAGE);
	p = dirty(at, 1024);
	for (unsigned i = 0; i < n; i++)        /* every page but the last, in no order, some more than once */
		list[i] = p + i * 389 % 1023;
	out = pfns(list, n);
	if (sandbox_enter(mock_vm(m), &err))
		return 99;
	mock_request(m, INFLATE, &out, 1, NULL, 0);
	return !is(at, 0) || !is(at + 1022 * PAGE, 0) || !is(at + 1023 * PAGE, 1);
}

START_TEST(test_a_full_list_is_taken_in_the_sandbox)
{
	int status;
	pid_t pid = fork();

	ck_assert_int_ge(pid, 0);
	if (!pid)
		_exit(inflate_shut_in());
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_msg(status == 0, "wait status 0x%x", (unsigned)status);
}
END_TEST

/* The first, before libc has asked what it asks once a process. */
UNIT_MAIN("balloon", test_a_full_list_is_taken_in_the_sandbox, test_inflate_gives_pages_back_to_the_host,
	test_row59_pages_outside_ram_are_skipped,
	test_row59_an_endless_list_is_capped_and_odd_bytes_ignored,
	test_reported_ranges_are_given_back_in_whole_pages, test_target_and_actual_in_config,
	test_target_beyond_ram_is_refused, test_reset_waits_for_the_worker)
