#ifndef VMM_VCPU_H
#define VMM_VCPU_H
/*
 * One thread per vCPU. Its descriptor and kvm_run are touched by that thread alone, the kick handler
 * included, which sets immediate_exit: a kick between the check and KVM_RUN is not lost.
 */
#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "vmm/error.h"
struct kvm_run;
struct vm;

enum vcpu_want { VCPU_PARK, VCPU_RUN, VCPU_EXIT };

/* Exits by kind, as the result file names them. */
enum vcpu_exit_kind {
	EXIT_PIO, EXIT_PIO_UNCLAIMED, EXIT_MMIO, EXIT_MMIO_UNCLAIMED, EXIT_HLT, EXIT_INTR, EXIT_MSR,
	EXIT_OTHER, EXIT_KINDS
};

struct vcpu_arch;

struct vcpu {
	/* const after vcpu_new() */
	struct vm *vm;
	unsigned index;
	pthread_t thread;
	struct vcpu_arch *arch;         /* src/arch */
	/* own thread only */
	int fd;
	struct kvm_run *run;
	size_t run_size;
	uint64_t exits[EXIT_KINDS];     /* read by others once parked */
	uint64_t first_run_ns;
	/* written under ctl, read by the run loop */
	_Atomic int want;
	pthread_mutex_t ctl;
	pthread_cond_t changed;
	int is;                         /* enum vcpu_want; -1 while starting */
	int start_err;                  /* const once is >= 0 */
	struct error start_why;
	void (*call)(struct vcpu *c, void *arg);
	void *call_arg;
};
#define ON_VCPU(c) assert(pthread_equal(pthread_self(), (c)->thread))

/* Main thread only. */
int  vcpu_new(struct vcpu **ret, struct vm *vm, unsigned index, struct error *err);    /* starts creating it on its own thread */
int  vcpu_ready(struct vcpu *c, struct error *err);             /* wait until it is created and parked */
void vcpu_want(struct vcpu *c, enum vcpu_want w);               /* kick; do not wait */
void vcpu_wait_parked(struct vcpu *c);                          /* after vcpu_want(PARK) */
void vcpu_call(struct vcpu *c, void (*fn)(struct vcpu *c, void *arg), void *arg); /* parked only: run there and wait */
void vcpu_free(struct vcpu *c);                                 /* ends the thread; NULL is fine */
#endif
