/* vmm run: from argv to the status. The main thread's whole story. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "cli.h"
#include "cmdline.h"
#include "config.h"
#include "failure.h"
#include "result.h"
#include "watch.h"
#include "vmm/arch.h"
#include "vmm/chardev.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/loop.h"
#include "vmm/net.h"
#include "vmm/sandbox.h"
#include "vmm/spawner.h"

#define FLUSH_MS 2000

static int die_with_parent(struct error *err)
{
	pid_t parent = getppid();

	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		return error_errno(err, errno, "--die-with-parent");
	/* It may have died before the call: then nobody would tell. */
	if (getppid() != parent || parent == 1)
		return error_set(err, ESRCH, "--die-with-parent: the parent is gone already");
	return 0;
}

static void quit_key(void *arg)
{
	vm_request_stop(arg, STOP_SIGNAL, SIGINT, "ended by the user (Ctrl-A x)");
}

static void break_key(void *arg)
{
	arch_serial_break(arg);
}

/* One line for all but a quiet success, and what is known about a vCPU that KVM gave up on. */
static void tell(struct vm *vm, int verbose)
{
	const struct vm_stop *s = &vm->stop;

	if (verbose < 0 || s->cause == STOP_POWEROFF || s->cause == STOP_VALUE)
		return;
	log_line(LOG_ERROR, "%s", s->words);
	if (s->cause == STOP_TIMEOUT && vm->software_kvm && cmdline_is_linux(vm))
		log_warn("this host's KVM is software: stock Linux kernels do not get far on it ('vmm doctor' "
			"says more)");
	if (s->cause != STOP_KVM)
		return;
	failure_report(vm);
}

/*
 * After a run the kernel takes a machine apart faster than we can: unbinding each eventfd from KVM waits
 * for an RCU period. Disk images are written out either way. Sanitizer builds do it all, and look for leaks.
 */
static void leave(struct vm *vm, int failed)
{
#ifndef __SANITIZE_ADDRESS__
	if (!failed) {
		vm_finish(vm);
		return;
	}
#endif
	(void)failed;
	vm_free(vm);
}

static int run(struct run_config *c, struct result *result, int signal_fd, struct spawner *spawner,
	struct vm_stop *stop, struct error *err)
{
	struct vm *vm = NULL;
	int r;

	if (SANITIZED && c->vm.sandbox != SANDBOX_OFF)
		log_info("sanitizer build: the sandbox is off");
	r = sandbox_prepare(SANITIZED ? SANDBOX_OFF : c->vm.sandbox, err);
	if (!r)
		r = vm_create(&vm, &c->vm, spawner, err);
	if (!r)
		r = sandbox_enter(vm, err);
	if (!r) {
		const struct chardev_keys keys = { .quit = quit_key, .send_break = break_key, .arg = vm };

		chardev_stdio_start(&keys);
		r = vm_start(vm, err);
		if (!r)
			r = watch_vm(vm, signal_fd, err);
		chardev_flush_all(FLUSH_MS);
		chardev_stdio_restore();
		if (!r) {
			*stop = vm->stop;
			tell(vm, c->verbose);
			r = result_write(result, vm, stop, err);
		}
	}
	leave(vm, r);
	return r;
}

/* The helpers this run may need are known to the spawner before it is forked, and it is forked before all else. */
static int start_spawner(const struct run_config *c, struct spawner **ret, struct error *err)
{
	int r = spawner_new(ret, err);

	for (unsigned i = 0; !r && i < c->vm.nr_devices; i++)
		if (!strcmp(c->devices[i].class, "net"))
			r = net_prepare(*ret, c->devices[i].args, err);
	if (!r)
		r = failure_prepare(*ret, err);
	return r ? r : spawner_seal(*ret, err);
}

int cmd_run(int argc, char **argv)
{
	struct result result = { .fd = -1, .self = -1, .start_ns = loop_now() };
	struct vm_stop stop = { .cause = STOP_HOST };
	static struct run_config c;
	struct spawner *spawner = NULL;
	struct error err = { 0 };
	int r, signal_fd = -1;

	r = config_parse(&c, argc, argv, &err);
	c.vm.start_ns = result.start_ns;
	if (!r && c.help)
		return 0;
	if (r && c.vm.result_path)      /* named before the mistake: it says so */
		result_open(&result, c.vm.result_path, NULL);
	if (!r) {
		log_set_level(c.verbose < 0 ? LOG_ERROR : LOG_WARN + (enum log_level)c.verbose);
		config_default_net(&c);
		r = result_open(&result, c.vm.result_path, &err);
	}
	if (!r && c.vm.die_with_parent)
		r = die_with_parent(&err);
	if (!r) {
		signal_fd = watch_signals(&err);
		r = signal_fd < 0 ? signal_fd : start_spawner(&c, &spawner, &err);
	}
	if (!r)
		r = run(&c, &result, signal_fd, spawner, &stop, &err);
	if (r) {
		struct error ignored;

		stop = (struct vm_stop){ .cause = STOP_HOST };
		snprintf(stop.words, sizeof(stop.words), "%.190s", err.msg);
		log_error("%s", err.msg);
		result_write(&result, NULL, &stop, &ignored);
	}
	spawner_free(spawner);
	if (signal_fd >= 0)
		close(signal_fd);
	return vm_stop_status(&stop);
}
