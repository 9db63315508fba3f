#include "vmm/vcpu.h"
#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include "exit.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/loop.h"
#include "vmm/sandbox.h"

/*
 * How this works. The thread follows `want`; `is` says what it has reached. A kick is a signal whose
 * handler, on the vCPU's own thread, sets immediate_exit:
 *
 *      main                            vCPU thread
 *      want = PARK                     while (want == RUN)
 *      pthread_kill(kick)                      KVM_RUN    <- returns -EINTR at once if immediate_exit
 *                                              immediate_exit = 0
 *
 * Wherever the signal lands, either the check sees the new want or KVM_RUN does not block.
 */
#define SIG_KICK SIGRTMIN

static __thread struct kvm_run *my_run;

static void on_kick(int sig)
{
	(void)sig;
	if (my_run)
		my_run->immediate_exit = 1;
}

/* Exits whose instruction KVM finishes at the next KVM_RUN. */
static bool has_more(uint32_t exit_reason)
{
	return exit_reason == KVM_EXIT_IO || exit_reason == KVM_EXIT_MMIO ||
		exit_reason == KVM_EXIT_X86_RDMSR || exit_reason == KVM_EXIT_X86_WRMSR;
}

/* An IN or an MMIO read still has its result to deliver: let KVM finish it before registers are touched. */
static void complete_pending(struct vcpu *c)
{
	c->run->immediate_exit = 1;
	ioctl(c->fd, KVM_RUN, 0);
	c->run->immediate_exit = 0;
}

static void run_guest(struct vcpu *c)
{
	bool pending = false;

	if (!c->first_run_ns)
		c->first_run_ns = loop_now();
	while (atomic_load(&c->want) == VCPU_RUN) {
		if (ioctl(c->fd, KVM_RUN, 0) < 0) {
			int e = errno;

			c->run->immediate_exit = 0;
			if (e == EINTR || e == EAGAIN) {
				c->exits[EXIT_INTR]++;
				pending = false;
				continue;
			}
			vcpu_run_failed(c, e);
			break;
		}
		pending = has_more(c->run->exit_reason);
		if (!vcpu_handle_exit(c))
			break;
	}
	if (pending)
		complete_pending(c);
}

/* Parked: serve calls until something else is wanted. A vCPU that stopped by itself waits for main to notice. */
static void park(struct vcpu *c, bool stopped)
{
	pthread_mutex_lock(&c->ctl);
	c->is = VCPU_PARK;
	pthread_cond_broadcast(&c->changed);
	for (;;) {
		int want = atomic_load(&c->want);

		if (c->call) {
			c->call(c, c->call_arg);
			c->call = NULL;
			pthread_cond_broadcast(&c->changed);
		} else if (want == VCPU_EXIT || (want == VCPU_RUN && !stopped)) {
			c->is = VCPU_RUN;       /* from here on a kick is a signal */
			break;
		} else {
			if (want == VCPU_PARK)
				stopped = false;
			pthread_cond_wait(&c->changed, &c->ctl);
		}
	}
	pthread_mutex_unlock(&c->ctl);
}

static int create(struct vcpu *c, struct error *err)
{
	int size = ioctl(c->vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);

	c->fd = ioctl(c->vm->vm_fd, KVM_CREATE_VCPU, c->index);
	if (c->fd < 0)
		return error_errno(err, errno, "cannot create vCPU %u", c->index);
	if (size < (int)sizeof(*c->run))
		return error_set(err, EINVAL, "KVM reports a kvm_run of %d bytes", size);
	c->run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
	if (c->run == MAP_FAILED) {
		c->run = NULL;
		return error_errno(err, errno, "cannot map the run state of vCPU %u", c->index);
	}
	c->run_size = (size_t)size;
	return arch_vcpu_init(c, err);
}

static void *vcpu_main(void *arg)
{
	struct vcpu *c = arg;
	char name[16];
	sigset_t kick;

	snprintf(name, sizeof(name), "vcpu/%u", c->index);
	prctl(PR_SET_NAME, name);
	c->start_err = create(c, &c->start_why);
	sandbox_thread();
	my_run = c->run;
	sigemptyset(&kick);
	sigaddset(&kick, SIG_KICK);
	pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
	park(c, false);
	while (atomic_load(&c->want) != VCPU_EXIT) {
		run_guest(c);
		park(c, true);
	}
	pthread_sigmask(SIG_BLOCK, &kick, NULL);
	my_run = NULL;
	arch_vcpu_free(c);
	return NULL;
}

int vcpu_new(struct vcpu **ret, struct vm *vm, unsigned index, struct error *err)
{
	const struct sigaction sa = { .sa_handler = on_kick };
	auto_free struct vcpu *c = calloc(1, sizeof(*c));
	int r;

	if (!c)
		return error_set(err, ENOMEM, "out of memory");
	c->vm = vm;
	c->index = index;
	c->fd = -1;
	c->is = -1;
	atomic_init(&c->want, VCPU_PARK);
	pthread_mutex_init(&c->ctl, NULL);
	pthread_cond_init(&c->changed, NULL);
	sigaction(SIG_KICK, &sa, NULL);
	/* The new thread starts with every signal blocked, as main has them (cli/run.c). */
	r = pthread_create(&c->thread, NULL, vcpu_main, c);
	if (r)
		return error_errno(err, r, "cannot start the thread of vCPU %u", index);
	*ret = TAKE_PTR(c);
	return 0;
}

int vcpu_ready(struct vcpu *c, struct error *err)
{
	pthread_mutex_lock(&c->ctl);
	while (c->is < 0)
		pthread_cond_wait(&c->changed, &c->ctl);
	pthread_mutex_unlock(&c->ctl);
	if (c->start_err && err)
		*err = c->start_why;
	return c->start_err;
}

void vcpu_want(struct vcpu *c, enum vcpu_want w)
{
	pthread_mutex_lock(&c->ctl);
	atomic_store(&c->want, w);
	pthread_cond_broadcast(&c->changed);
	if (c->is == VCPU_RUN)
		pthread_kill(c->thread, SIG_KICK);
	pthread_mutex_unlock(&c->ctl);
}

void vcpu_wait_parked(struct vcpu *c)
{
	pthread_mutex_lock(&c->ctl);
	while (c->is != VCPU_PARK)
		pthread_cond_wait(&c->changed, &c->ctl);
	pthread_mutex_unlock(&c->ctl);
}

void vcpu_call(struct vcpu *c, void (*fn)(struct vcpu *c, void *arg), void *arg)
{
	pthread_mutex_lock(&c->ctl);
	assert(c->is == VCPU_PARK && !c->call);
	c->call = fn;
	c->call_arg = arg;
	pthread_cond_broadcast(&c->changed);
	while (c->call)
		pthread_cond_wait(&c->changed, &c->ctl);
	pthread_mutex_unlock(&c->ctl);
}

void vcpu_free(struct vcpu *c)
{
	if (!c)
		return;
	vcpu_want(c, VCPU_EXIT);
	pthread_join(c->thread, NULL);
	if (c->run)
		munmap(c->run, c->run_size);
	if (c->fd >= 0)
		close(c->fd);
	pthread_mutex_destroy(&c->ctl);
	pthread_cond_destroy(&c->changed);
	free(c);
}
