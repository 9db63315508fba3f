/*
 * The machine's life: built, started, paused, reset, stopped. Main thread, but for vm_request_stop() and
 * its kin.
 *
 *      CREATED --start--> RUNNING --pause--> PAUSED --resume--> RUNNING
 *                            |                 |  \--reset--> PAUSED
 *                            +------halt-------+------> STOPPED
 */
#include "vmm/vm.h"
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "cmdline.h"
#include "devices/virtio/transport.h"
#include "vmm/arch.h"
#include "vmm/chardev.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/kvm.h"
#include "vmm/log.h"
#include "vmm/opts.h"
#include "vmm/pci.h"
#include "vmm/spawner.h"
#include "vmm/vcpu.h"
#include "vmm/virtio.h"

/* ---- any thread ---- */

static void wake_main(struct vm *vm)
{
	uint64_t one = 1;

	if (write(vm->wake_fd, &one, sizeof(one)) < 0)
		return;         /* the counter is at its maximum: main is awake */
}

void vm_request_stop(struct vm *vm, enum stop_cause cause, int value, const char *fmt, ...)
{
	va_list ap;

	pthread_mutex_lock(&vm->stop_lock);
	if (vm->stop.cause == STOP_NONE) {
		vm->stop.cause = cause;
		vm->stop.value = value;
		va_start(ap, fmt);
		vsnprintf(vm->stop.words, sizeof(vm->stop.words), fmt, ap);
		va_end(ap);
		/* What a kernel does after its panic (reboot, halt) is still the panic's end. */
		if (atomic_load(&vm->panic_ns) &&
			(cause == STOP_RESET || cause == STOP_TRIPLE_FAULT || cause == STOP_HALTED ||
				cause == STOP_POWEROFF)) {
			vm->stop.cause = STOP_PANIC;
			snprintf(vm->stop.words, sizeof(vm->stop.words), "guest kernel panic (%s)",
				vm->panic_how);
		}
	}
	pthread_mutex_unlock(&vm->stop_lock);
	wake_main(vm);
}

void vm_guest_value(struct vm *vm, uint64_t value, const char *device)
{
	int status = value & 0xff;

	if (!status && value)
		status = 255;
	pthread_mutex_lock(&vm->stop_lock);
	if (vm->stop.cause == STOP_NONE) {
		vm->stop.guest_value = value;
		vm->stop.has_guest_value = true;
	}
	pthread_mutex_unlock(&vm->stop_lock);
	vm_request_stop(vm, STOP_VALUE, status, "guest reported %llu (%s)", (unsigned long long)value,
		device);
}

void vm_panic_seen(struct vm *vm, const char *how)
{
	uint64_t none = 0;

	if (vm->cfg->ignore_panic)
		return;
	pthread_mutex_lock(&vm->stop_lock);
	if (!vm->panic_how)
		vm->panic_how = how;
	pthread_mutex_unlock(&vm->stop_lock);
	atomic_compare_exchange_strong(&vm->panic_ns, &none, loop_now());
	wake_main(vm);
}

void vm_panic_over(struct vm *vm)
{
	if (atomic_load(&vm->panic_ns))
		vm_request_stop(vm, STOP_PANIC, 0, "guest kernel panic (%s)", vm->panic_how);
}

void vm_request(struct vm *vm, uint32_t requests)
{
	uint32_t drop = (requests & VM_REQ_PAUSE ? VM_REQ_RESUME : 0) | (requests & VM_REQ_RESUME ? VM_REQ_PAUSE : 0);
	uint32_t old = atomic_load(&vm->requests);

	while (!atomic_compare_exchange_weak(&vm->requests, &old, (old & ~drop) | requests))
		;
	wake_main(vm);
}

void vm_hold(struct vm *vm, bool on)
{
	if (on && atomic_fetch_add(&vm->holds, 1) == 0)
		vm_request(vm, VM_REQ_PAUSE);
	if (!on && atomic_fetch_sub(&vm->holds, 1) == 1)
		vm_request(vm, VM_REQ_RESUME);
}

/* ---- building ---- */

int vm_add_device(struct vm *vm, const char *name, void *dev, void (*reset)(void *),
	void (*describe)(void *, struct facts *), void (*free_fn)(void *), struct error *err)
{
	struct vm_device *d = calloc(1, sizeof(*d)), **end = &vm->devices;

	if (!d)
		return error_set(err, ENOMEM, "out of memory");
	*d = (struct vm_device){ name, dev, reset, describe, free_fn, NULL };
	while (*end)
		end = &(*end)->next;
	*end = d;
	return 0;
}

int vm_add_virtio(struct vm *vm, struct virtio *v, struct error *err)
{
	unsigned same = 0;
	int r;

	if (vm->nr_virtio == ARRAY_LEN(vm->virtio))
		return error_set(err, ENOSPC, "more than %zu virtio devices", ARRAY_LEN(vm->virtio));
	for (unsigned i = 0; i < vm->nr_virtio; i++)
		same += !strcmp(vm->virtio[i]->ops->name, v->ops->name);
	snprintf(v->name, sizeof(v->name), "%s%u", v->ops->name, same);
	if (vm->pci) {
		r = virtio_pci_new(vm, v, err);
	} else {
		gpa_t base;
		unsigned gsi;

		r = arch_virtio_mmio_slot(vm->nr_virtio, &base, &gsi);
		if (r)
			return error_set(err, ENOSPC, "this machine has room for %u virtio devices",
				vm->nr_virtio);
		r = virtio_mmio_new(vm, v, base, gsi, err);
	}
	if (!r)
		vm->virtio[vm->nr_virtio++] = v;
	return r;
}

static int add_memory(struct vm *vm, struct error *err)
{
	struct gmem_region layout[GMEM_REGIONS];
	unsigned nr = arch_ram_layout(vm->cfg->mem, layout, GMEM_REGIONS);
	int r = gmem_init(&vm->mem, layout, nr, vm->cfg->hugepages, err);

	if (r)
		return r;
	for (unsigned i = 0; i < vm->mem.nr; i++) {
		const struct gmem_region *g = &vm->mem.region[i];
		struct kvm_userspace_memory_region slot = {
			.slot = i,
			.guest_phys_addr = g->base,
			.memory_size = g->size,
			.userspace_addr = (uintptr_t)g->host,
		};

		if (ioctl(vm->vm_fd, KVM_SET_USER_MEMORY_REGION, &slot))
			return error_errno(err, errno, "cannot give the guest %llu MiB of memory",
				(unsigned long long)(g->size >> 20));
	}
	return 0;
}

static int add_vcpus(struct vm *vm, struct error *err)
{
	int max = ioctl(vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS), r;

	if (max > 0 && vm->cfg->cpus > (unsigned)max)
		return error_set(err, EINVAL, "--cpus %u: this KVM takes at most %d", vm->cfg->cpus, max);
	vm->vcpu = calloc(vm->cfg->cpus, sizeof(vm->vcpu[0]));
	if (!vm->vcpu)
		return error_set(err, ENOMEM, "out of memory");
	for (unsigned i = 0; i < vm->cfg->cpus; i++) {
		r = vcpu_new(&vm->vcpu[i], vm, i, err);
		if (r)
			return r;
		vm->nr_vcpus++;
	}
	return 0;
}

static const struct device_class *find_class(const char *name)
{
	for (unsigned i = 0; device_classes[i]; i++)
		if (!strcmp(device_classes[i]->name, name))
			return device_classes[i];
	return NULL;
}

static int add_devices(struct vm *vm, struct error *err)
{
	for (unsigned i = 0; i < vm->cfg->nr_devices; i++) {
		const struct device_spec *s = &vm->cfg->devices[i];
		const struct device_class *class = find_class(s->class);
		struct opts *o;
		int r;

		if (!class)
			return error_set(err, EINVAL, "%s: no device class '%s' (vmm --device help lists them)",
				s->option, s->class);
		r = opts_parse(&o, s->option, s->args, class->implied, err);
		if (r)
			return r;
		r = class->create(vm, o, err);
		opts_free(o);
		if (r)
			return r;
	}
	return 0;
}

static void boot_vcpu(struct vcpu *c, void *arg)
{
	struct error *err = arg;

	if (arch_vcpu_boot(c, &c->vm->boot, err) && !err->code)
		error_set(err, EIO, "cannot set the first registers of vCPU %u", c->index);
}

/* The kernel into RAM, the boot information beside it, every vCPU to its first instruction. */
static int load(struct vm *vm, struct error *err)
{
	struct error why = { 0 };
	int r = loader_load(vm->loader, &vm->mem, &vm->boot, err);

	if (!r)
		r = cmdline_complete(vm, err);
	if (!r)
		r = arch_boot_setup(vm, &vm->boot, err);
	for (unsigned i = 0; !r && i < vm->nr_vcpus; i++) {
		r = vcpu_ready(vm->vcpu[i], err);
		if (r)
			break;
		vcpu_call(vm->vcpu[i], boot_vcpu, &why);
		if (why.code) {
			*err = why;
			r = -why.code;
		}
	}
	return r;
}

static int build(struct vm *vm, struct error *err)
{
	int r;

	vm->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (vm->wake_fd < 0)
		return error_errno(err, errno, "cannot create an eventfd");
	if ((r = loader_open(&vm->loader, &vm->cfg->boot, err)))
		return r;
	vm->kvm_fd = kvm_open(err);
	if (vm->kvm_fd < 0)
		return vm->kvm_fd;
	if ((r = kvm_check(vm->kvm_fd, err)))
		return r;
	vm->software_kvm = kvm_is_software();
	vm->vm_fd = ioctl(vm->kvm_fd, KVM_CREATE_VM, 0);
	if (vm->vm_fd < 0)
		return error_errno(err, errno, "cannot create a virtual machine");
	vm->io = loop_new("io/0", vm->cfg->engine, vm->cfg->poll_us, err);
	if (!vm->io)
		return -err->code;
	if ((r = arch_vm_init(vm, err)) || (r = add_vcpus(vm, err)) || (r = add_memory(vm, err)) ||
		(r = arch_platform(vm, err)) || (r = add_devices(vm, err)))
		return r;
	return load(vm, err);
}

int vm_iothread(struct vm *vm, unsigned n, int64_t poll_us, struct loop **ret, struct error *err)
{
	unsigned us = poll_us < 0 ? vm->cfg->poll_us : (unsigned)poll_us;
	char name[16];

	if (!n && poll_us >= 0 && us != vm->cfg->poll_us)
		return error_set(err, EINVAL, "poll_us= is for a thread of its own (iothread=1 to %u): --poll-us is for the common one",
			VM_IOTHREADS);
	if (n && vm->iothread[n - 1] && poll_us >= 0 && us != vm->iothread_poll_us[n - 1])
		return error_set(err, EINVAL, "iothread=%u already looks for %u us", n, vm->iothread_poll_us[n - 1]);
	if (n && !vm->iothread[n - 1]) {
		snprintf(name, sizeof(name), "io/%u", n);
		vm->iothread[n - 1] = loop_new(name, vm->cfg->engine, us, err);
		if (!vm->iothread[n - 1])
			return -err->code;
		vm->iothread_poll_us[n - 1] = us;
	}
	*ret = n ? vm->iothread[n - 1] : vm->io;
	return 0;
}

int vm_create(struct vm **ret, const struct vm_config *cfg, struct spawner *spawner,
	struct error *err)
{
	struct error own = { 0 };
	struct vm *vm = calloc(1, sizeof(*vm));
	int r;

	if (!vm)
		return error_set(err, ENOMEM, "out of memory");
	vm->cfg = cfg;
	vm->spawner = spawner;
	vm->kvm_fd = vm->vm_fd = vm->wake_fd = vm->mem.fd = -1;
	bus_init(&vm->pio);
	bus_init(&vm->mmio);
	pthread_mutex_init(&vm->stop_lock, NULL);
	r = build(vm, &own);
	if (r) {
		if (err)
			*err = own;
		vm_free(vm);
		return r;
	}
	*ret = vm;
	return 0;
}

/* ---- running ---- */

static void run_all(struct vm *vm)
{
	for (unsigned i = 0; i < vm->nr_vcpus; i++)
		vcpu_want(vm->vcpu[i], VCPU_RUN);
}

static void park_all(struct vm *vm)
{
	for (unsigned i = 0; i < vm->nr_vcpus; i++)
		vcpu_want(vm->vcpu[i], VCPU_PARK);
	for (unsigned i = 0; i < vm->nr_vcpus; i++)
		vcpu_wait_parked(vm->vcpu[i]);
}

static int transition(struct vm *vm, enum vm_state from, enum vm_state to, struct error *err)
{
	static const char *const names[VM_NR_STATES] = { "created", "running", "paused", "stopped" };

	if (vm->state != from)
		return error_set(err, EINVAL, "the machine is %s, not %s", names[vm->state], names[from]);
	vm->state = to;
	return 0;
}

int vm_start(struct vm *vm, struct error *err)
{
	int r = transition(vm, VM_CREATED, VM_RUNNING, err);

	if (!r)
		run_all(vm);
	return r;
}

int vm_pause(struct vm *vm, struct error *err)
{
	int r = transition(vm, VM_RUNNING, VM_PAUSED, err);

	if (!r)
		park_all(vm);
	return r;
}

int vm_resume(struct vm *vm, struct error *err)
{
	int r = transition(vm, VM_PAUSED, VM_RUNNING, err);

	if (!r)
		run_all(vm);
	return r;
}

int vm_reset(struct vm *vm, struct error *err)
{
	int r = transition(vm, VM_PAUSED, VM_PAUSED, err);

	if (!r && !vm->cfg->restart_on_reboot)
		r = error_set(err, EINVAL, "the machine was not made to start again (--on-reboot restart)");
	if (r)
		return r;
	if (!vm->cfg->restart_on_reboot)
		return error_set(err, ENOTSUP, "this machine was not built to be reset");
	for (unsigned i = 0; i < vm->nr_virtio; i++)
		virtio_reset(vm->virtio[i]);
	if (vm->pci)
		pci_reset(vm->pci);
	for (struct vm_device *d = vm->devices; d; d = d->next)
		if (d->reset)
			d->reset(d->dev);
	vm->resets++;
	pthread_mutex_lock(&vm->stop_lock);
	vm->stop = (struct vm_stop){ .cause = STOP_NONE };
	vm->panic_how = NULL;
	atomic_store(&vm->panic_ns, 0);
	pthread_mutex_unlock(&vm->stop_lock);
	if ((r = arch_vm_reset(vm, err)) || (r = gmem_clear(&vm->mem, err)))
		return r;
	return load(vm, err);
}

void vm_halt(struct vm *vm)
{
	if (vm->state == VM_RUNNING)
		park_all(vm);
	vm->state = VM_STOPPED;
	/* The guest's last words may still lie in a console's ring, their doorbell unheard. */
	for (unsigned i = 0; i < vm->nr_virtio; i++)
		virtio_settle(vm->virtio[i]);
}

void vm_finish(struct vm *vm)
{
	for (unsigned i = 0; i < vm->nr_virtio; i++) {
		struct virtio *v = vm->virtio[i];

		virtio_reset(v);
		if (v->ops->finish)
			v->ops->finish(v);
	}
}

struct dead_count {
	unsigned dead;
};

static void count_dead(struct vcpu *c, void *arg)
{
	struct dead_count *n = arg;

	n->dead += arch_vcpu_dead(c);
}

bool vm_is_dead(struct vm *vm)
{
	struct dead_count n = { 0 };

	if (vm->state != VM_RUNNING)
		return false;
	park_all(vm);
	for (unsigned i = 0; i < vm->nr_vcpus; i++)
		vcpu_call(vm->vcpu[i], count_dead, &n);
	if (n.dead < vm->nr_vcpus)
		run_all(vm);
	else
		vm->state = VM_PAUSED;
	return n.dead == vm->nr_vcpus;
}

/* ---- the end ---- */

static void describe_exits(struct vm *vm, struct facts *f)
{
	static const char *const names[EXIT_KINDS] = { "pio", "pio_unclaimed", "mmio", "mmio_unclaimed",
		"hlt", "interrupted", "msr", "other" };
	struct facts *e = facts_object(f, "exits");

	for (unsigned k = 0; k < EXIT_KINDS; k++) {
		uint64_t sum = 0;

		for (unsigned i = 0; i < vm->nr_vcpus; i++)
			sum += vm->vcpu[i]->exits[k];
		facts_u64(e, names[k], sum);
	}
}

static void describe_virtio(const struct vm *vm, struct virtio *v, struct facts *f)
{
	uint64_t at = atomic_load(&v->driver_ok_ns);

	if (at)
		facts_f64(f, "driver_ok_seconds", (double)(at - vm->cfg->start_ns) / 1e9);
	else
		facts_str(f, "driver_ok_seconds", NULL);        /* no driver took it */
	virtio_describe(v, f);
}

static void describe_loop(const struct loop *l, struct facts *f)
{
	struct loop_stats st;

	loop_get_stats(l, &st);
	facts_str(f, "engine", loop_engine_name(l));
	facts_u64(f, "turns", st.turns);
	facts_u64(f, "enters", st.enters);
	facts_u64(f, "sleeps", st.sleeps);
	facts_u64(f, "polled", st.polled);
}

void vm_describe(struct vm *vm, struct facts *f)
{
	struct facts *devices;

	facts_str(f, "machine", vm->cfg->machine == MACHINE_PC ? "pc" : "microvm");
	facts_u64(f, "memory", gmem_total(&vm->mem));
	facts_u64(f, "cpus", vm->nr_vcpus);
	facts_str(f, "kernel", vm->boot.format);
	facts_bool(f, "software_kvm", vm->software_kvm);
	facts_u64(f, "resets", vm->resets);
	describe_exits(vm, f);
	describe_loop(vm->io, facts_object(f, "loop"));
	for (unsigned n = 0; n < VM_IOTHREADS; n++) {
		char name[16];

		snprintf(name, sizeof(name), "iothread%u", n + 1);
		if (vm->iothread[n])
			describe_loop(vm->iothread[n], facts_object(f, name));
	}
	devices = facts_object(f, "devices");
	for (unsigned i = 0; i < vm->nr_virtio; i++)
		describe_virtio(vm, vm->virtio[i], facts_object(devices, vm->virtio[i]->name));
	for (struct vm_device *d = vm->devices; d; d = d->next)
		if (d->describe)
			d->describe(d->dev, facts_object(devices, d->name));
}

void vm_free(struct vm *vm)
{
	if (!vm)
		return;
	for (unsigned i = 0; i < vm->nr_vcpus; i++)
		vcpu_free(vm->vcpu[i]);
	free(vm->vcpu);
	for (unsigned i = vm->nr_virtio; i-- > 0;)
		virtio_free(vm->virtio[i]);
	for (struct vm_device *d = vm->devices, *next; d; d = next) {
		next = d->next;
		if (d->free)
			d->free(d->dev);
		free(d);
	}
	arch_vm_free(vm);
	for (unsigned n = 0; n < VM_IOTHREADS; n++)
		loop_free(vm->iothread[n]);
	loop_free(vm->io);
	gmem_done(&vm->mem);
	loader_free(vm->loader);
	if (vm->vm_fd >= 0)
		close(vm->vm_fd);
	if (vm->kvm_fd >= 0)
		close(vm->kvm_fd);
	if (vm->wake_fd >= 0)
		close(vm->wake_fd);
	bus_done(&vm->pio);
	bus_done(&vm->mmio);
	pthread_mutex_destroy(&vm->stop_lock);
	free(vm->autopsy);
	free(vm);
}
