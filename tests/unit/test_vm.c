/* The machine's life on the real /dev/kvm: a flat real-mode payload that counts, and what the main thread does to it. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cli/watch.h"
#include "unit.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/log.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

#define CODE    0x8000
#define COUNTER 0x9000
#define PATIENCE_NS 60000000000ull

/* mov dword [0x9000] up by one, for ever: xor ax, ax; mov ds, ax; 1: inc dword [COUNTER]; jmp 1b */
static const uint8_t count[] = { 0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, 0x00, 0x90, 0xeb, 0xf9 };
static const uint8_t cli_hlt[] = { 0xfa, 0xf4, 0xeb, 0xfc };
static const uint8_t sti_hlt[] = { 0xfb, 0xf4, 0xeb, 0xfc };
static const uint8_t report[] = { 0xb0, 0x07, 0xe6, 0xf4, 0xeb, 0xfe };      /* out 0xf4, 7 */
static const uint8_t reset[] = { 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe };       /* out 0x64, 0xfe */

static struct vm_config cfg;
static struct vm *vm;
static struct error err;
static char kernel[64];
static int signal_fd = -1;

static void create_with(const uint8_t *code, size_t len, unsigned cpus, bool restart)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), fd;

	if (kvm < 0) {
		puts("skipped: /dev/kvm cannot be opened");
		exit(77);
	}
	close(kvm);
	snprintf(kernel, sizeof(kernel), "/tmp/test_vm-%d", getpid());
	fd = open(kernel, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	ck_assert(fd >= 0 && write(fd, code, len) == (ssize_t)len && !close(fd));
	cfg = (struct vm_config){ .machine = MACHINE_MICROVM, .mem = 1 << 20, .cpus = cpus, .cpu = "host",
		.restart_on_reboot = restart, .debug_exit = true, .debug_exit_port = 0xf4, .engine = LOOP_AUTO,
		.boot = { .kernel = kernel, .cmdline = "", .has_load_address = true, .load_address = CODE } };
	ck_assert_msg(vm_create(&vm, &cfg, NULL, &err) == 0, "%s", err.msg);
	ck_assert_int_eq(vm->state, VM_CREATED);
}

static void create(const uint8_t *code, size_t len, unsigned cpus)
{
	create_with(code, len, cpus, false);
}

static void destroy(void)
{
	vm_free(vm);
	vm = NULL;
	unlink(kernel);
}

static uint32_t counter(void)
{
	uint32_t v = 0;

	ck_assert_int_eq(gmem_read(&vm->mem, COUNTER, &v, sizeof(v)), 0);
	return v;
}

/* Until the guest has counted past n. */
static void await_count_above(uint32_t n)
{
	uint64_t end = loop_now() + PATIENCE_NS;

	while (counter() <= n) {
		ck_assert_uint_lt(loop_now(), end);
		sched_yield();
	}
}

static void ok(int r)
{
	ck_assert_msg(r == 0, "%s", err.msg);
}

START_TEST(test_a_created_machine_does_not_run)
{
	create(count, sizeof(count), 2);
	ck_assert_uint_eq(counter(), 0);
	ck_assert_uint_eq(vm->vcpu[0]->first_run_ns, 0);
	destroy();
}
END_TEST

START_TEST(test_pause_stands_still_and_resume_goes_on)
{
	uint32_t at;

	create(count, sizeof(count), 1);
	ok(vm_start(vm, &err));
	await_count_above(0);
	ok(vm_pause(vm, &err));
	ck_assert_int_eq(vm->state, VM_PAUSED);
	at = counter();
	for (int i = 0; i < 1000; i++) {
		sched_yield();
		ck_assert_uint_eq(counter(), at);
	}
	ok(vm_resume(vm, &err));
	await_count_above(at);
	vm_halt(vm);
	ck_assert_int_eq(vm->state, VM_STOPPED);
	destroy();
}
END_TEST

START_TEST(test_pause_and_resume_lose_no_wakeup)
{
	create(count, sizeof(count), 4);
	ok(vm_start(vm, &err));
	for (int i = 0; i < 200; i++) {
		ok(vm_pause(vm, &err));
		ok(vm_resume(vm, &err));
	}
	await_count_above(counter());
	vm_halt(vm);
	destroy();
}
END_TEST

START_TEST(test_reset_is_a_power_on)
{
	create_with(count, sizeof(count), 1, true);
	ok(vm_start(vm, &err));
	await_count_above(10);
	ok(vm_pause(vm, &err));
	ok(vm_reset(vm, &err));
	ck_assert_int_eq(vm->state, VM_PAUSED);
	ck_assert_uint_eq(counter(), 0);        /* memory is clear */
	ck_assert_uint_eq(vm->resets, 1);
	ok(vm_resume(vm, &err));
	await_count_above(10);                  /* and the kernel is back at its start */
	vm_halt(vm);
	destroy();
}
END_TEST

START_TEST(test_reset_is_refused_where_power_on_state_was_not_kept)
{
	create(count, sizeof(count), 1);
	ok(vm_start(vm, &err));
	ok(vm_pause(vm, &err));
	ck_assert_int_eq(vm_reset(vm, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "--on-reboot"));
	ok(vm_resume(vm, &err));
	await_count_above(counter());
	vm_halt(vm);
	destroy();
}
END_TEST

START_TEST(test_transitions_from_the_wrong_state_are_refused_with_words)
{
	create(count, sizeof(count), 1);
	ck_assert_int_lt(vm_pause(vm, &err), 0);
	ck_assert_str_eq(err.msg, "the machine is created, not running");
	ck_assert_int_lt(vm_resume(vm, &err), 0);
	ck_assert_int_lt(vm_reset(vm, &err), 0);
	ok(vm_start(vm, &err));
	ck_assert_int_lt(vm_start(vm, &err), 0);
	ck_assert_int_lt(vm_reset(vm, &err), 0);
	vm_halt(vm);
	ck_assert_int_lt(vm_resume(vm, &err), 0);
	ck_assert_str_eq(err.msg, "the machine is stopped, not paused");
	destroy();
}
END_TEST

START_TEST(test_halted_with_interrupts_off_is_dead_with_them_on_is_not)
{
	uint64_t end = loop_now() + PATIENCE_NS;

	create(cli_hlt, sizeof(cli_hlt), 2);
	ck_assert(!vm_is_dead(vm));             /* not running */
	ok(vm_start(vm, &err));
	while (!vm_is_dead(vm))
		ck_assert_uint_lt(loop_now(), end);
	ck_assert_int_eq(vm->state, VM_PAUSED);
	destroy();

	create(sti_hlt, sizeof(sti_hlt), 1);
	ok(vm_start(vm, &err));
	for (int i = 0; i < 50; i++)
		ck_assert(!vm_is_dead(vm));
	ck_assert_int_eq(vm->state, VM_RUNNING);
	vm_halt(vm);
	destroy();
}
END_TEST

static void watch(void)
{
	if (signal_fd < 0)
		signal_fd = watch_signals(&err);
	ck_assert_int_ge(signal_fd, 0);
	ok(vm_start(vm, &err));
	ok(watch_vm(vm, signal_fd, &err));
	ck_assert_int_eq(vm->state, VM_STOPPED);
}

START_TEST(test_the_first_reason_to_stop_wins)
{
	create(count, sizeof(count), 1);
	vm_request_stop(vm, STOP_TIMEOUT, 0, "first");
	vm_request_stop(vm, STOP_RESET, 0, "second");
	watch();
	ck_assert_int_eq(vm->stop.cause, STOP_TIMEOUT);
	ck_assert_str_eq(vm->stop.words, "first");
	destroy();
}
END_TEST

START_TEST(test_the_guests_value_ends_the_watch)
{
	create(report, sizeof(report), 1);
	watch();
	ck_assert_int_eq(vm_stop_status(&vm->stop), 7);
	ck_assert(vm->stop.has_guest_value && vm->stop.guest_value == 7);
	destroy();
}
END_TEST

/* A thread that is not the main thread asks; the guest is seen to stand still, then to go on. */
static void *asker(void *arg)
{
	uint32_t at;

	(void)arg;
	await_count_above(0);
	vm_request(vm, VM_REQ_PAUSE);
	do {
		at = counter();
		for (int i = 0; i < 2000; i++)
			sched_yield();
	} while (at != counter());
	vm_request(vm, VM_REQ_RESUME);
	await_count_above(at);
	vm_request(vm, VM_REQ_RESET);
	return NULL;
}

START_TEST(test_pause_resume_and_reset_by_request)
{
	pthread_t t;

	create(count, sizeof(count), 1);
	ck_assert_int_eq(pthread_create(&t, NULL, asker, NULL), 0);
	watch();
	pthread_join(t, NULL);
	ck_assert_int_eq(vm->stop.cause, STOP_RESET);
	destroy();
}
END_TEST

START_TEST(test_restarts_go_on_until_the_timeout)
{
	create_with(reset, sizeof(reset), 2, true);
	cfg.timeout_ns = 500000000;
	watch();
	ck_assert_int_eq(vm->stop.cause, STOP_TIMEOUT);
	ck_assert_uint_gt(vm->resets, 1);
	destroy();
}
END_TEST

START_TEST(test_a_signal_without_grace_ends_the_watch)
{
	create(count, sizeof(count), 1);
	signal_fd = signal_fd < 0 ? watch_signals(&err) : signal_fd;
	kill(getpid(), SIGTERM);
	watch();
	ck_assert_int_eq(vm->stop.cause, STOP_SIGNAL);
	ck_assert_int_eq(vm_stop_status(&vm->stop), 128 + SIGTERM);
	destroy();
}
END_TEST

START_TEST(test_create_fails_with_words_and_leaves_nothing)
{
	struct device_spec bad = { "nosuch", "--device", "" };

	create(count, sizeof(count), 1);
	destroy();
	cfg.boot.kernel = "/nonexistent/kernel";
	ck_assert_int_lt(vm_create(&vm, &cfg, NULL, &err), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "/nonexistent/kernel"));
	create(count, sizeof(count), 1);
	vm_free(vm);
	cfg.devices = &bad;
	cfg.nr_devices = 1;
	ck_assert_int_lt(vm_create(&vm, &cfg, NULL, &err), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "no device class 'nosuch'"));
	cfg.nr_devices = 0;
	cfg.cpus = 4096;
	ck_assert_int_lt(vm_create(&vm, &cfg, NULL, &err), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "--cpus"));
	unlink(kernel);
}
END_TEST

START_TEST(test_the_last_device_that_lets_go_resumes_the_machine)
{
	struct vm v = { .wake_fd = -1 };

	vm_hold(&v, true);
	vm_hold(&v, true);
	ck_assert_uint_eq(v.requests, VM_REQ_PAUSE);
	vm_hold(&v, false);
	ck_assert_uint_eq(v.requests, VM_REQ_PAUSE);
	vm_hold(&v, false);
	ck_assert_uint_eq(v.requests, VM_REQ_RESUME);
	vm_request(&v, VM_REQ_POWER_BUTTON);
	vm_hold(&v, true);
	ck_assert_uint_eq(v.requests, VM_REQ_PAUSE | VM_REQ_POWER_BUTTON);
}
END_TEST

UNIT_MAIN("vm", test_a_created_machine_does_not_run, test_pause_stands_still_and_resume_goes_on,
	test_pause_and_resume_lose_no_wakeup, test_reset_is_a_power_on,
	test_reset_is_refused_where_power_on_state_was_not_kept,
	test_transitions_from_the_wrong_state_are_refused_with_words,
	test_halted_with_interrupts_off_is_dead_with_them_on_is_not, test_the_first_reason_to_stop_wins,
	test_the_guests_value_ends_the_watch, test_pause_resume_and_reset_by_request,
	test_restarts_go_on_until_the_timeout, test_a_signal_without_grace_ends_the_watch,
	test_create_fails_with_words_and_leaves_nothing,
	test_the_last_device_that_lets_go_resumes_the_machine)
