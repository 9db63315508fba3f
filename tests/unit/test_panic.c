/* Panic recognition on a byte stream. */
#include <stdlib.h>
#include "machine.h"
#include "unit.h"
#include "vmm/panic.h"

static struct test_machine m;
static struct panic_watch w;

/* Feed text in pieces of `chunk` bytes; a NUL-free exact copy, so that a sanitizer sees the first byte too far. */
static void feed(const char *text, size_t chunk)
{
	size_t len = strlen(text);
	uint8_t *copy = malloc(len);

	memcpy(copy, text, len);
	for (size_t i = 0; i < len; i += chunk)
		panic_watch_feed(&w, copy + i, len - i < chunk ? len - i : chunk);
	free(copy);
}

static void setup(void)
{
	machine_init(&m);
	panic_watch_init(&w, &m.vm, "serial0");
}

static void teardown(void)
{
	panic_watch_done(&w);
	machine_done(&m);
}

static const char log_text[] =
	"[    1.2] fine\r\n"
	"[    1.234567][    T1] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n"
	"[    1.3] CPU: 0 PID: 1\r\n"
	"[    1.234569] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\r\n";

START_TEST(test_panic_is_found_whatever_the_chunks)
{
	for (size_t chunk = 1; chunk < sizeof(log_text); chunk++) {
		setup();
		feed(log_text, chunk);
		ck_assert_uint_ne(m.vm.panic_ns, 0);
		ck_assert_str_eq(m.vm.panic_how,
			"serial0: Kernel panic - not syncing: VFS: Unable to mount root fs");
		ck_assert_int_eq(m.vm.stop.cause, STOP_PANIC);
		teardown();
	}
}
END_TEST

START_TEST(test_panic_prefixes_are_optional)
{
	static const char *const lines[] = {
		"Kernel panic - not syncing: a\n",
		"<0>Kernel panic - not syncing: a\n",
		"<0>[    0.000000] Kernel panic - not syncing: a\n",
		"\r[12345.678901] Kernel panic - not syncing: a\n",
		"[    0.000000][C10] Kernel panic - not syncing\n",
	};

	for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
		setup();
		feed(lines[i], 1000);
		ck_assert_msg(m.vm.panic_ns, "%s", lines[i]);
		ck_assert_int_eq(m.vm.stop.cause, STOP_NONE);
		teardown();
	}
}
END_TEST

START_TEST(test_panic_only_at_a_line_start)
{
	static const char *const lines[] = {
		"a line about Kernel panic - not syncing: a\n",
		"[x] Kernel panic - not syncing: a\n",
		"[1][2][3] Kernel panic - not syncing: a\n",
		"<0 >Kernel panic - not syncing: a\n",
		"  Kernel panic - not syncing: a\n",
		"[    1.0] kernel panic - not syncing: a\n",
		"Kernel panic - not synci\nng: a\n",
		"[\n[ 1.0\n<\n<0\n[]\n\n",
	};

	for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
		setup();
		feed(lines[i], 3);
		ck_assert_msg(!m.vm.panic_ns, "%s", lines[i]);
		teardown();
	}
}
END_TEST

START_TEST(test_panic_end_line_counts_when_its_newline_is_out)
{
	setup();
	feed("---[ end Kernel panic - not syncing: a ]---", 7);
	ck_assert_uint_eq(m.vm.panic_ns, 0);
	feed("\r", 1);
	feed("\n", 1);
	ck_assert_int_eq(m.vm.stop.cause, STOP_PANIC);
	teardown();
}
END_TEST

START_TEST(test_panic_line_without_end_is_judged_and_bounded)
{
	char text[4 * PANIC_LINE + 1];

	setup();
	memset(text, 'x', sizeof(text) - 1);
	text[sizeof(text) - 1] = '\0';
	memcpy(text, "Kernel panic - not syncing", 26);
	feed(text, 5);
	ck_assert_uint_ne(m.vm.panic_ns, 0);
	ck_assert_uint_lt(strlen(m.vm.panic_how), PANIC_LINE + 16);
	teardown();
	setup();
	memset(text, 'x', 26);
	memcpy(text + 2 * PANIC_LINE, "Kernel panic - not syncing", 26);
	feed(text, sizeof(text));
	ck_assert_uint_eq(m.vm.panic_ns, 0);
	teardown();
}
END_TEST

UNIT_MAIN("panic", test_panic_is_found_whatever_the_chunks, test_panic_prefixes_are_optional,
	test_panic_only_at_a_line_start, test_panic_end_line_counts_when_its_newline_is_out,
	test_panic_line_without_end_is_judged_and_bounded)
