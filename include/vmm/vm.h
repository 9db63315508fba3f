#ifndef VMM_VM_H
#define VMM_VM_H
/*
 * The virtual machine: what it is made of, how it is built, started and stopped. Built by the main thread;
 * everything marked const is fixed before vCPUs run.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include "vmm/bus.h"
#include "vmm/gmem.h"
#include "vmm/irq.h"
#include "vmm/loader.h"
#include "vmm/loop.h"
#include "vmm/sandbox.h"
struct chardev;
struct error;
struct facts;
struct opts;
struct pci_bus;
struct platform;
struct spawner;
struct vcpu;
struct virtio;
struct vm;

/* One --disk, --net, --device …: class is looked up in src/devices/table.c. */
struct device_spec {
	const char *class;
	const char *option;             /* for messages: "--disk" */
	const char *args;
};

enum machine { MACHINE_PC, MACHINE_MICROVM };
enum debug_exit_mode { DEBUG_EXIT_RAW, DEBUG_EXIT_QEMU };

#define VM_SERIALS 4

struct vm_config {
	enum machine machine;
	uint64_t mem;                   /* bytes */
	bool hugepages;
	unsigned cpus;
	const char *cpu;                /* "host,-cx16,+x" */
	struct boot_config boot;
	struct device_spec *devices;
	unsigned nr_devices;
	const char *serial[VM_SERIALS]; /* chardev specs, NULL: no such port */
	const char *debugcon;           /* chardev spec for port 0xe9, NULL: none */
	bool debug_exit;
	uint16_t debug_exit_port;
	enum debug_exit_mode debug_exit_mode;
	bool testdev;
	bool restart_on_reboot;         /* also: remember the power-on state that vm_reset() needs */
	bool ignore_panic;
	uint64_t timeout_ns;            /* 0: none */
	uint64_t grace_ns;              /* from the power button to the end, on SIGTERM and SIGINT */
	const char *result_path;
	uint64_t start_ns;              /* CLOCK_MONOTONIC when vmm began: times in the result count from it */
	enum loop_engine engine;
	unsigned poll_us;
	bool die_with_parent;
	enum sandbox_mode sandbox;
};

/* Why the VM stopped: data, not control flow. The process status follows from it (docs/exit-status.md). */
enum stop_cause {
	STOP_NONE,
	STOP_POWEROFF,          /* ACPI S5 and its like */
	STOP_VALUE,             /* value: what the guest reported, as the process status */
	STOP_RESET,
	STOP_PANIC,
	STOP_TRIPLE_FAULT,
	STOP_HALTED,            /* all vCPUs halted with interrupts off */
	STOP_WATCHDOG,
	STOP_KVM,               /* internal error, failed entry, unknown exit */
	STOP_TIMEOUT,
	STOP_HOST,              /* vmm itself could not go on */
	STOP_SIGNAL,            /* value: signal number */
};
struct vm_stop {
	enum stop_cause cause;
	int value;
	uint64_t guest_value;           /* STOP_VALUE: all bits the guest wrote */
	bool has_guest_value;
	char words[200];
};
/* The process status that stands for it (docs/exit-status.md), and its name in the result file. */
int vm_stop_status(const struct vm_stop *s);
const char *vm_stop_name(enum stop_cause cause);

enum vm_state { VM_CREATED, VM_RUNNING, VM_PAUSED, VM_STOPPED, VM_NR_STATES };

/* Anything that must be reset, described and freed with the machine. Hooks run on the main thread, no vCPU runs. */
struct vm_device {
	const char *name;
	void *dev;
	void (*reset)(void *dev);                       /* machine reset: back to power-on; optional */
	void (*describe)(void *dev, struct facts *f);   /* its part of the result; optional */
	void (*free)(void *dev);                        /* optional */
	struct vm_device *next;
};

#define VM_IOTHREADS 7          /* besides io/0 */

struct vm {
	/* const after vm_create() */
	const struct vm_config *cfg;
	int kvm_fd, vm_fd;
	struct gmem mem;
	struct bus pio, mmio;
	struct irqchip irqs;
	struct loop *io;                /* home of all devices that want no other: "io/0" */
	struct loop *iothread[VM_IOTHREADS];    /* "io/1" ...; NULL: nobody asked for it */
	unsigned iothread_poll_us[VM_IOTHREADS];
	struct vcpu **vcpu;
	unsigned nr_vcpus;
	struct pci_bus *pci;            /* NULL on microvm */
	struct platform *platform;      /* src/arch */
	struct spawner *spawner;        /* starts helpers after the sandbox is shut; may be NULL */
	struct loader *loader;
	struct boot_image boot;
	char cmdline[BOOT_CMDLINE_MAX]; /* what the kernel is given */
	struct vm_device *devices;      /* in the order of creation */
	struct virtio *virtio[64];
	unsigned nr_virtio;
	struct chardev *serial[VM_SERIALS];
	bool software_kvm;              /* ring 0 is interpreted (the kvm_pvm module) */

	/* main thread */
	enum vm_state state;
	unsigned resets;

	/* any thread */
	pthread_mutex_t stop_lock;      /* guards stop and autopsy */
	struct vm_stop stop;            /* the first request wins */
	char *autopsy;                  /* registers of the vCPU that KVM gave up on, or NULL */
	uint8_t autopsy_insn[16];
	unsigned autopsy_insn_len;
	uint64_t autopsy_rip;
	const char *panic_how;          /* who saw the panic; under stop_lock */
	int wake_fd;                    /* eventfd: main looks at stop, requests, panic_ns */
	_Atomic uint32_t requests;      /* VM_REQ_* */
	_Atomic unsigned holds;         /* vm_hold() */
	_Atomic uint64_t panic_ns;      /* when a panic was first seen; 0: none */
};

/* src/devices/table.c lists them all: a device is one file and one line. */
struct device_class {
	const char *name;               /* "blk": --device blk,… */
	const char *help;               /* its keys, one line */
	const char *implied;            /* key of a first part without "=", or NULL */
	int (*create)(struct vm *vm, struct opts *o, struct error *err);
};
extern const struct device_class *const device_classes[];       /* NULL-terminated */

/* For devices, while the VM is built; main thread. */
int  vm_add_virtio(struct vm *vm, struct virtio *v, struct error *err); /* on success the VM owns it */
/*
 * The loop for a device that shall live on I/O thread n (0 to VM_IOTHREADS; 0: the common one), started when first asked for. poll_us: how
 * long it looks before it sleeps, -1: as --poll-us says. Put it into v->home before vm_add_virtio(). 0 or -EINVAL with words.
 */
int  vm_iothread(struct vm *vm, unsigned n, int64_t poll_us, struct loop **ret, struct error *err);
int  vm_add_device(struct vm *vm, const char *name, void *dev, void (*reset)(void *),
	void (*describe)(void *, struct facts *), void (*free)(void *), struct error *err);

/* Main thread. */
/* spawner: sealed, stays the caller's; cfg must outlive the VM. */
int  vm_create(struct vm **ret, const struct vm_config *cfg, struct spawner *spawner,
	struct error *err);
int  vm_start(struct vm *vm, struct error *err);        /* CREATED -> RUNNING */
int  vm_pause(struct vm *vm, struct error *err);        /* RUNNING -> PAUSED */
int  vm_resume(struct vm *vm, struct error *err);       /* PAUSED  -> RUNNING */
int  vm_reset(struct vm *vm, struct error *err);        /* PAUSED, stays PAUSED: power-on state, kernel loaded again; needs cfg->restart_on_reboot */
void vm_halt(struct vm *vm);                            /* any state -> STOPPED; vCPUs are parked for good */
bool vm_is_dead(struct vm *vm);                         /* RUNNING: all vCPUs halted with interrupts off, none can wake */
void vm_describe(struct vm *vm, struct facts *f);       /* STOPPED */
void vm_finish(struct vm *vm);                          /* STOPPED: on return no I/O is in flight, disk images are written out, no helper is needed; the process may end */
void vm_free(struct vm *vm);                            /* any state; NULL is fine */

/* Any thread. */
__attribute__((format(printf, 4, 5)))
void vm_request_stop(struct vm *vm, enum stop_cause cause, int value, const char *fmt, ...);
/* The guest reported a value: the low 8 bits become the status (255 where those are 0 and the value is not). */
void vm_guest_value(struct vm *vm, uint64_t value, const char *device);
/* A panic was seen by pvpanic or on a console: ends the run with 101 once its last words are out. */
void vm_panic_seen(struct vm *vm, const char *how);
void vm_panic_over(struct vm *vm);                      /* its last line was seen */

#define VM_REQ_PAUSE        1u
#define VM_REQ_RESUME       2u
#define VM_REQ_RESET        4u
#define VM_REQ_POWER_BUTTON 8u
void vm_request(struct vm *vm, uint32_t requests);      /* of PAUSE and RESUME the last one counts */
/* A device cannot go on (the host is full): the machine is paused; resumed when all that held it let go. */
void vm_hold(struct vm *vm, bool on);
#endif
