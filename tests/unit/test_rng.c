/* virtio-rng under the mock driver. */
#include <string.h>
#include "mock_driver.h"
#include "unit.h"
#include "vmm/error.h"

extern const struct device_class rng_class;

#define REQUEST_MAX (64u << 10)
#define BIG         (1u << 20)

static struct mock *m;

static void begin(void)
{
	m = mock_new(LOOP_AUTO);
	mock_create(m, &rng_class, "");
	mock_init(m, ~0ull);
}

static unsigned zeroes(const uint8_t *p, size_t n)
{
	unsigned z = 0;

	while (n--)
		z += !*p++;
	return z;
}

START_TEST(test_fills_the_room_given_with_random_bytes)
{
	struct mock_buf in[2];

	begin();
	in[0] = (struct mock_buf){ mock_alloc(m, 1000), 1000 };
	in[1] = (struct mock_buf){ mock_alloc(m, 3000), 3000 };
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_DEVICE_ID), 4);
	ck_assert_uint_eq(mock_request(m, 0, NULL, 0, in, 2), 4000);
	ck_assert_uint_le(zeroes(mock_at(m, in[0].at, 1000), 1000), 100);
	ck_assert_uint_le(zeroes(mock_at(m, in[1].at, 3000), 3000), 100);
	mock_free(m);
}
END_TEST

START_TEST(test_row58_a_huge_request_gets_64_kib)
{
	struct mock_buf in;
	uint8_t *p;

	begin();
	in = (struct mock_buf){ mock_alloc(m, BIG), BIG };
	p = mock_at(m, in.at, BIG);
	ck_assert_uint_eq(mock_request(m, 0, NULL, 0, &in, 1), REQUEST_MAX);
	ck_assert_uint_eq(zeroes(p + REQUEST_MAX, BIG - REQUEST_MAX), BIG - REQUEST_MAX);
	mock_free(m);
}
END_TEST

START_TEST(test_row58_a_flood_is_paced_and_all_of_it_served)
{
	struct mock_buf in;
	uint64_t start = loop_now();

	begin();
	in = (struct mock_buf){ mock_alloc(m, BIG), BIG };
	for (unsigned i = 0; i < 48; i++) {     /* 3 MiB, at 1 MiB in 100 ms */
		mock_add(m, 0, NULL, 0, &in, 1);
		mock_kick(m, 0);
	}
	for (unsigned i = 0; i < 48; i++)
		ck_assert(mock_wait(m, 0, NULL, NULL));
	ck_assert_uint_ge(loop_now() - start, 190000000ull);
	mock_free(m);
}
END_TEST

START_TEST(test_reset_while_paced)
{
	struct mock_buf in;

	begin();
	in = (struct mock_buf){ mock_alloc(m, BIG), BIG };
	for (unsigned i = 0; i < 40; i++)
		mock_add(m, 0, NULL, 0, &in, 1);
	mock_kick(m, 0);
	mock_settle(m);
	mock_init(m, ~0ull);
	ck_assert_uint_ge(mock_request(m, 0, NULL, 0, &in, 1), 1);
	mock_free(m);
}
END_TEST

START_TEST(test_chain_without_room_comes_back_empty)
{
	struct mock_buf out;

	begin();
	out = (struct mock_buf){ mock_alloc(m, 64), 64 };
	ck_assert_uint_eq(mock_request(m, 0, &out, 1, NULL, 0), 0);
	mock_free(m);
}
END_TEST

START_TEST(test_unknown_key_is_refused)
{
	struct error err;

	m = mock_new(LOOP_AUTO);
	ck_assert_int_lt(mock_try_create(m, &rng_class, "rate=5", &err), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "rate"));
	mock_free(m);
}
END_TEST

UNIT_MAIN("rng", test_fills_the_room_given_with_random_bytes,
	test_row58_a_huge_request_gets_64_kib, test_row58_a_flood_is_paced_and_all_of_it_served,
	test_reset_while_paced, test_chain_without_room_comes_back_empty, test_unknown_key_is_refused)
