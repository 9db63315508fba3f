/* The README's worked example of a device does what the README says. */
#include <string.h>
#include "mock_driver.h"
#include "unit.h"
#include "../support/example_device.c"

START_TEST(test_example_device_gives_text_back_in_capitals)
{
	struct mock *m = mock_new(LOOP_AUTO);
	struct mock_buf out = { mock_alloc(m, 5), 5 }, in = { mock_alloc(m, 64), 64 };

	mock_create(m, &upper_class, "");
	mock_init(m, ~0ull);
	memcpy(mock_at(m, out.at, 5), "hello", 5);
	ck_assert_uint_eq(mock_request(m, 0, &out, 1, &in, 1), 5);
	ck_assert_mem_eq(mock_at(m, in.at, 6), "HELLO", 6);
	mock_free(m);
}
END_TEST

START_TEST(test_example_device_refuses_keys)
{
	struct mock *m = mock_new(LOOP_AUTO);
	struct error err;

	ck_assert_int_eq(mock_try_create(m, &upper_class, "lower=on", &err), -EINVAL);
	mock_free(m);
}
END_TEST

UNIT_MAIN("example", test_example_device_gives_text_back_in_capitals,
	test_example_device_refuses_keys)
