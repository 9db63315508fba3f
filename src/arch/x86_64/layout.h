#ifndef ARCH_X86_64_LAYOUT_H
#define ARCH_X86_64_LAYOUT_H
/* The guest-physical map of both machines. RAM ends at 3 GiB and goes on at 4 GiB. */
#define LOW_RAM_END      0xc0000000ull  /* 3 GiB */
#define HIGH_RAM_BASE    0x100000000ull /* 4 GiB */

/* Boot structures below 640 KiB; all of it but the zero-filled rest is reported as RAM. */
#define BOOT_GDT         0x500ull
#define BOOT_PVH_INFO    0x6000ull      /* hvm_start_info, its modules and memory map */
#define BOOT_ZERO_PAGE   0x7000ull
#define BOOT_PAGE_TABLES 0x9000ull      /* 6 pages: PML4, PDPT, 4 page directories: the first 4 GiB */
#define BOOT_STACK       0x8ff0ull
#define BOOT_MULTIBOOT   0x10000ull     /* multiboot information, up to 0x20000 */
#define BOOT_CMDLINE     0x20000ull
#define BOOT_SETUP_DATA  0x22000ull     /* RNG seed */
#define BOOT_LOW_END     0x30000ull     /* loaders may use RAM from here on */

#define EBDA             0x9fc00ull     /* MP floating pointer; reserved up to 640 KiB */
#define ACPI_BASE        0xe0000ull     /* RSDP first: found by scanning too; tables up to 0x100000, reserved */
#define ACPI_END         0x100000ull

/* The 32-bit hole. */
#define PCI_MMIO_BASE    0xc0000000ull
#define PCI_MMIO_END     0xd0000000ull
#define VIRTIO_MMIO_BASE 0xd0000000ull  /* 4 KiB a device */
#define VIRTIO_MMIO_MAX  32
#define PCI_ECAM_BASE    0xe0000000ull  /* 1 MiB: bus 0 */
#define IOAPIC_BASE      0xfec00000ull
#define LAPIC_BASE       0xfee00000ull
#define KVM_TSS_BASE     0xfffbd000ull  /* 3 pages */
#define KVM_IDENTITY_MAP 0xfffbc000ull
#define TESTDEV_RAM      0xff000000ull  /* --testdev: one page */
#define PCI_IO_BASE      0xc000
#define PCI_IO_END       0xffff

/* Lines. PCI INTx: 16-19. virtio-mmio: 16-23. */
#define IRQ_COM1         4
#define IRQ_COM2         3
#define IRQ_RTC          8
#define IRQ_SCI          9
#define IRQ_PCI_FIRST    16
#define IRQ_MMIO_FIRST   16
#define IRQ_MMIO_COUNT   8

/* ACPI fixed hardware, where test kernels written for QEMU look for it: outw(0x604, 0x2000) powers off. */
#define PM1_EVT_PORT     0x600
#define PM1_CNT_PORT     0x604
#define PM_TMR_PORT      0x608
#define SLP_TYP_S5       0
#define RESET_PORT       0xcf9
#define RESET_VALUE      0x06
#endif
