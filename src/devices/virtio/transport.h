#ifndef VIRTIO_TRANSPORT_H
#define VIRTIO_TRANSPORT_H
/*
 * The two ways a virtio device sits on a machine. Main thread, while the VM is built; on success the
 * transport belongs to the device and goes with virtio_free(). A vm with vm_fd -1 (unit tests) gets
 * everything but KVM's ioeventfds.
 */
#include "vmm/virtio.h"
#include "vmm/vm.h"

#define VIRTIO_MMIO_SIZE 0x200  /* registers, and all of the configuration space */

/* virtio 1.2, 4.2: registers at base, edge interrupt on gsi. */
int virtio_mmio_new(struct vm *vm, struct virtio *v, gpa_t base, unsigned gsi, struct error *err);

/* virtio 1.2, 4.1, modern only: on the next free slot of vm->pci. */
int virtio_pci_new(struct vm *vm, struct virtio *v, struct error *err);

/*
 * Bind queue qi's doorbell to a write of len bytes at addr, of the value qi if match; on false, unbind. Where
 * KVM refuses, the doorbell comes by exit: slower, no less right.
 */
void virtio_bell_bind(const struct vm *vm, struct virtio *v, unsigned qi, gpa_t addr, unsigned len,
	bool match, bool on);

/* For unit tests, which have no KVM to take it: the eventfd of the device's interrupt. */
int virtio_mmio_irq_fd(const struct virtio *v);
#endif
