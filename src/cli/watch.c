#include "watch.h"
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>
#include "vmm/arch.h"
#include "vmm/chardev.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/loop.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

#define PANIC_GRACE_NS 1000000000ull    /* for the panic's last words, where their end is not recognised */
#define IDLE_FIRST_NS  20000000ull      /* the check for a dead guest: first after 20 ms of idling, */
#define IDLE_MAX_NS    2000000000ull    /* then ever more rarely: an idle guest is left in peace */

struct watch {
	struct vm *vm;
	int signal_fd;
	uint64_t start_ns;
	uint64_t grace_end;     /* after SIGTERM: the guest must be off by then; 0: no signal yet */
	int signal;
	uint64_t idle_at, idle_step, cpu_ns;
};

int watch_signals(struct error *err)
{
	sigset_t set;
	int fd;

	sigfillset(&set);
	/* Faults are ours to die of; all else comes through the descriptor, or not at all. */
	for (const int *s = (const int[]){ SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, 0 }; *s; s++)
		sigdelset(&set, *s);
	sigprocmask(SIG_BLOCK, &set, NULL);
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGQUIT);
	sigaddset(&set, SIGWINCH);
	fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return fd < 0 ? error_errno(err, errno, "cannot watch for signals") : fd;
}

static void end_by_signal(struct watch *w, const char *how)
{
	vm_request_stop(w->vm, STOP_SIGNAL, w->signal, "ended by %s (%s)", strsignal(w->signal), how);
}

/* The first signal presses the power button, where the guest listens to it; the second ends the run. */
static void on_signal(struct watch *w, int sig)
{
	if (w->signal) {
		end_by_signal(w, "signalled again");
		return;
	}
	w->signal = sig;
	if (sig == SIGQUIT || !w->vm->cfg->grace_ns) {
		end_by_signal(w, "at once");
	} else if (!arch_power_button(w->vm)) {
		end_by_signal(w, "the guest does not listen to the power button");
	} else {
		log_info("%s: power button pressed", strsignal(sig));
		w->grace_end = loop_now() + w->vm->cfg->grace_ns;
	}
}

static void read_signals(struct watch *w)
{
	struct signalfd_siginfo si;

	while (read(w->signal_fd, &si, sizeof(si)) == sizeof(si)) {
		if (si.ssi_signo == SIGWINCH)
			chardev_stdio_resized();
		else
			on_signal(w, (int)si.ssi_signo);
	}
}

static uint64_t vcpu_cpu_ns(struct vm *vm)
{
	uint64_t sum = 0;

	for (unsigned i = 0; i < vm->nr_vcpus; i++) {
		struct timespec ts;
		clockid_t clock;

		if (!pthread_getcpuclockid(vm->vcpu[i]->thread, &clock) && !clock_gettime(clock, &ts))
			sum += (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
	}
	return sum;
}

/*
 * With the irqchip in the kernel a halt does not come back to us. vCPUs that used no CPU time since the last
 * look may be halted for good: park them and see. A guest that is merely idle is asked ever more rarely.
 */
static void check_dead(struct watch *w, uint64_t now)
{
	uint64_t cpu = vcpu_cpu_ns(w->vm);

	if (cpu == w->cpu_ns) {
		if (vm_is_dead(w->vm)) {
			vm_request_stop(w->vm, STOP_HALTED, 0, "all vCPUs halted with interrupts off");
			return;
		}
		cpu = vcpu_cpu_ns(w->vm);
		w->idle_step = w->idle_step * 2 < IDLE_MAX_NS ? w->idle_step * 2 : IDLE_MAX_NS;
	}
	w->cpu_ns = cpu;
	w->idle_at = now + w->idle_step;
}

static void check_deadlines(struct watch *w, uint64_t now)
{
	const struct vm_config *cfg = w->vm->cfg;
	uint64_t panic = atomic_load(&w->vm->panic_ns);

	if (panic && now >= panic + PANIC_GRACE_NS)
		vm_panic_over(w->vm);
	if (w->grace_end && now >= w->grace_end)
		end_by_signal(w, "the guest did not power off in time");
	if (cfg->timeout_ns && now >= w->start_ns + cfg->timeout_ns)
		vm_request_stop(w->vm, STOP_TIMEOUT, 0, "timeout after %g s", (double)cfg->timeout_ns / 1e9);
	if (w->vm->state == VM_RUNNING && now >= w->idle_at)
		check_dead(w, now);
}

static uint64_t next_deadline(const struct watch *w)
{
	const struct vm_config *cfg = w->vm->cfg;
	uint64_t panic = atomic_load(&w->vm->panic_ns), at = UINT64_MAX;

	if (w->vm->state == VM_RUNNING)
		at = w->idle_at;
	if (panic && panic + PANIC_GRACE_NS < at)
		at = panic + PANIC_GRACE_NS;
	if (w->grace_end && w->grace_end < at)
		at = w->grace_end;
	if (cfg->timeout_ns && w->start_ns + cfg->timeout_ns < at)
		at = w->start_ns + cfg->timeout_ns;
	return at;
}

static int do_requests(struct watch *w, struct error *err)
{
	uint32_t req = atomic_exchange(&w->vm->requests, 0);
	int r = 0;

	if (req & VM_REQ_POWER_BUTTON)
		arch_power_button(w->vm);
	if (req & VM_REQ_RESET)
		vm_request_stop(w->vm, STOP_RESET, 0, "reset by the user");
	if (req & VM_REQ_PAUSE && w->vm->state == VM_RUNNING)
		r = vm_pause(w->vm, err);
	if (req & VM_REQ_RESUME && w->vm->state == VM_PAUSED)
		r = vm_resume(w->vm, err);
	return r;
}

static int restart(struct watch *w, struct error *err)
{
	int r = 0;

	log_info("%s: starting again", w->vm->stop.words);
	if (w->vm->state == VM_RUNNING)
		r = vm_pause(w->vm, err);
	if (!r)
		r = vm_reset(w->vm, err);
	if (!r)
		r = vm_resume(w->vm, err);
	w->idle_step = IDLE_FIRST_NS;
	w->idle_at = loop_now() + w->idle_step;
	return r;
}

/* True when the run is over. */
static bool stopped(struct watch *w, struct error *err)
{
	struct vm *vm = w->vm;
	struct vm_stop stop;

	pthread_mutex_lock(&vm->stop_lock);
	stop = vm->stop;
	pthread_mutex_unlock(&vm->stop_lock);
	if (stop.cause == STOP_NONE)
		return false;
	if (stop.cause == STOP_RESET && vm->cfg->restart_on_reboot && !w->signal)
		return restart(w, err) != 0;
	return true;
}

/* However the guest ended after a signal, the signal is why. */
static void blame_signal(struct watch *w)
{
	struct vm_stop *s = &w->vm->stop;

	if (!w->signal || s->cause == STOP_SIGNAL || s->cause == STOP_TIMEOUT || s->cause == STOP_KVM)
		return;
	s->cause = STOP_SIGNAL;
	s->value = w->signal;
	snprintf(s->words, sizeof(s->words), "ended by %s (the guest powered off)", strsignal(w->signal));
}

int watch_vm(struct vm *vm, int signal_fd, struct error *err)
{
	struct watch w = {
		.vm = vm,
		.signal_fd = signal_fd,
		.start_ns = loop_now(),
		.idle_step = IDLE_FIRST_NS,
	};
	struct error own = { 0 };

	w.idle_at = w.start_ns + w.idle_step;
	while (!stopped(&w, &own) && !own.code) {
		struct pollfd fds[] = { { signal_fd, POLLIN, 0 }, { vm->wake_fd, POLLIN, 0 } };
		uint64_t now = loop_now(), at = next_deadline(&w), count;
		struct timespec ts = { 0 };

		if (at > now) {
			ts.tv_sec = (time_t)((at - now) / 1000000000ull);
			ts.tv_nsec = (long)((at - now) % 1000000000ull);
		}
		if (ppoll(fds, 2, at == UINT64_MAX ? NULL : &ts, NULL) > 0) {
			if (fds[0].revents)
				read_signals(&w);
			if (fds[1].revents && read(vm->wake_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
				error_errno(&own, errno, "eventfd");
		}
		do_requests(&w, &own);
		check_deadlines(&w, loop_now());
	}
	vm_halt(vm);
	blame_signal(&w);
	if (own.code && err)
		*err = own;
	return -own.code;
}
