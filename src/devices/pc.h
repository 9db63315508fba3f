#ifndef DEVICES_PC_H
#define DEVICES_PC_H
/*
 * The devices of a PC that sit at fixed ports. Each is one file, made by its _new() function on the main
 * thread while the VM is built; from then on the VM owns it. Only src/arch/x86_64/platform.c calls these.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include "vmm/bus.h"
#include "vmm/vm.h"
struct chardev;
struct error;
struct facts;

#define PC_RANGES 2

/* One const table per device. */
struct pc_class {
	const char *name;
	struct {
		uint16_t port, size;            /* port 0: the place is given to pc_device_add() */
		const struct bus_ops *ops;
	} range[PC_RANGES];
	bool lockless;                          /* the ops lock for themselves, or need no lock */
	void (*reset)(void *dev);               /* power-on state; also called once by pc_device_add(); optional */
	void (*describe)(void *dev, struct facts *f);   /* optional */
	void (*done)(void *dev);                /* what the device holds besides its own struct; optional */
};

/* First member of every device struct. */
struct pc_device {
	struct vm *vm;
	const struct pc_class *class;
	struct bus_region region[PC_RANGES];
	pthread_mutex_t lock;                   /* leaf: guards the registers; nothing is waited for under it */
};

/*
 * Reset d, put it on the port bus and on the VM's list. d is on the heap and all its resources are made; it is
 * freed here on failure, and by the VM later. base: where a range with port 0 goes.
 */
int pc_device_add(struct vm *vm, struct pc_device *d, const struct pc_class *class, uint16_t base,
	struct error *err);

int serial_new(struct vm *vm, unsigned n, struct error *err);   /* COM(n+1) on vm->serial[n], which may be NULL */
void serial_break(struct vm *vm, unsigned n);   /* any thread once the VM is built: a break arrives at COM(n+1), if there */
int rtc_new(struct vm *vm, struct error *err);
int i8042_new(struct vm *vm, bool reset_only, struct error *err);
int port92_new(struct vm *vm, struct error *err);
int reset_control_new(struct vm *vm, struct error *err);
int post_new(struct vm *vm, struct error *err);
int debugcon_new(struct vm *vm, const char *spec, struct error *err);
int pvpanic_new(struct vm *vm, struct error *err);
int debug_exit_new(struct vm *vm, struct error *err);
int shutdown_port_new(struct vm *vm, struct error *err);
int fw_cfg_new(struct vm *vm, struct error *err);
int pc_testdev_new(struct vm *vm, struct error *err);
int pci_testdev_new(struct vm *vm, struct error *err);

struct acpi_pm;
int  acpi_pm_new(struct acpi_pm **ret, struct vm *vm, struct error *err);
bool acpi_pm_power_button(struct acpi_pm *pm);  /* any thread */
#endif
