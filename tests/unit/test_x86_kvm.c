/* vCPUs on the real /dev/kvm: a VM and a vCPU filled by hand. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include "arch/x86_64/cpu.h"
#include "arch/x86_64/layout.h"
#include "unit.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/vcpu.h"

static struct error err;
static struct vm_config cfg = { .machine = MACHINE_MICROVM, .mem = 2 << 20, .cpus = 1, .cpu = "host",
	.restart_on_reboot = true };
static struct vm vm;
static struct vcpu cpu;

static void open_vm(void)
{
	struct gmem_region layout[2];

	vm = (struct vm){ .cfg = &cfg };
	cpu = (struct vcpu){ .vm = &vm };
	vm.kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm.kvm_fd < 0) {
		puts("skipped: /dev/kvm cannot be opened");
		exit(77);
	}
	bus_init(&vm.pio);
	vm.vm_fd = ioctl(vm.kvm_fd, KVM_CREATE_VM, 0);
	ck_assert_int_ge(vm.vm_fd, 0);
	ck_assert_int_eq(ioctl(vm.vm_fd, KVM_SET_TSS_ADDR, (unsigned long)KVM_TSS_BASE), 0);
	ck_assert_int_eq(ioctl(vm.vm_fd, KVM_CREATE_IRQCHIP, 0), 0);
	ck_assert_int_eq(gmem_init(&vm.mem, layout, arch_ram_layout(cfg.mem, layout, 2), false, &err), 0);
	for (unsigned i = 0; i < vm.mem.nr; i++) {
		struct kvm_userspace_memory_region m = { .slot = i, .guest_phys_addr = vm.mem.region[i].base,
			.memory_size = vm.mem.region[i].size,
			.userspace_addr = (uintptr_t)vm.mem.region[i].host };

		ck_assert_int_eq(ioctl(vm.vm_fd, KVM_SET_USER_MEMORY_REGION, &m), 0);
	}
	cpu.fd = ioctl(vm.vm_fd, KVM_CREATE_VCPU, 0);
	ck_assert_int_ge(cpu.fd, 0);
	cpu.run_size = ioctl(vm.kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	cpu.run = mmap(NULL, cpu.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, cpu.fd, 0);
	ck_assert_ptr_ne(cpu.run, MAP_FAILED);
	ck_assert_msg(arch_vcpu_init(&cpu, &err) == 0, "%s", err.msg);
}

static void close_vm(void)
{
	arch_vcpu_free(&cpu);
	munmap(cpu.run, cpu.run_size);
	close(cpu.fd);
	close(vm.vm_fd);
	close(vm.kvm_fd);
	gmem_done(&vm.mem);
	bus_done(&vm.pio);
}

static void boot(enum boot_protocol p, gpa_t entry, const void *code, size_t len)
{
	struct boot_image b = { .protocol = p, .entry = entry, .cmdline = "test=1 quiet" };

	ck_assert_int_eq(gmem_write(&vm.mem, entry, code, len), 0);
	ck_assert_msg(arch_boot_setup(&vm, &b, &err) == 0, "%s", err.msg);
	ck_assert_msg(arch_vcpu_boot(&cpu, &b, &err) == 0, "%s", err.msg);
}

static uint32_t run_until_out(uint16_t port)
{
	uint32_t val = 0;

	for (;;) {
		ck_assert_int_eq(ioctl(cpu.fd, KVM_RUN, 0), 0);
		if (cpu.run->exit_reason == KVM_EXIT_IO)
			break;
		ck_assert_msg(arch_vcpu_exit(&cpu, cpu.run) == 0, "exit reason %u", cpu.run->exit_reason);
	}
	ck_assert_uint_eq(cpu.run->io.port, port);
	memcpy(&val, (uint8_t *)cpu.run + cpu.run->io.data_offset, cpu.run->io.size);
	return val;
}

/* out %eax, $0xf4 after each of: */
static const uint8_t say_eax[] = { 0xe7, 0xf4 };                                /* out %eax, $0xf4 */
static const uint8_t say_mb[] = { 0x8b, 0x03, 0xe7, 0xf4 };                     /* mov (%ebx), %eax */
static const uint8_t say_zero_page[] = { 0x8b, 0x86, 0x02, 0x02, 0, 0, 0xe7, 0xf4 };    /* 0x202(%rsi) */
static const uint8_t say_real[] = { 0x8c, 0xc8, 0xe7, 0xf4 };                   /* mov %cs, %ax */

START_TEST(test_every_protocol_reaches_its_first_instruction)
{
	open_vm();
	boot(BOOT_MULTIBOOT1, 0x100000, say_eax, sizeof(say_eax));
	ck_assert_uint_eq(run_until_out(0xf4), 0x2badb002);
	boot(BOOT_MULTIBOOT2, 0x100000, say_eax, sizeof(say_eax));
	ck_assert_uint_eq(run_until_out(0xf4), 0x36d76289);
	boot(BOOT_PVH, 0x100000, say_mb, sizeof(say_mb));
	ck_assert_uint_eq(run_until_out(0xf4), 0x336ec578);
	boot(BOOT_FLAT32, 0x100000, say_mb, sizeof(say_mb));
	ck_assert_uint_eq(run_until_out(0xf4), 0x336ec578);
	boot(BOOT_FLAT64, 0x100000, say_mb, sizeof(say_mb));
	ck_assert_uint_eq(run_until_out(0xf4), 0x336ec578);
	boot(BOOT_LINUX32, 0x100000, say_zero_page, sizeof(say_zero_page));
	ck_assert_uint_eq(run_until_out(0xf4), 0x53726448);
	boot(BOOT_LINUX64, 0x100000, say_zero_page, sizeof(say_zero_page));
	ck_assert_uint_eq(run_until_out(0xf4), 0x53726448);
	boot(BOOT_FLAT16, 0x7c00, say_real, sizeof(say_real));
	ck_assert_uint_eq(run_until_out(0xf4) & 0xffff, 0x7c0);
	close_vm();
}
END_TEST

/* lidt of nothing, int3: not tried; a guest changes what it can, then the machine is reset. */
START_TEST(test_reset_restores_power_on_state)
{
	struct kvm_lapic_state l, fresh;
	struct kvm_mp_state mp = { KVM_MP_STATE_HALTED };
	struct kvm_debugregs d = { .db = { 0x1234 }, .dr6 = 0xffff0ff0, .dr7 = 0x401 };
	struct kvm_sregs s;
	uint64_t star = 0, clock = 0;

	open_vm();
	boot(BOOT_FLAT64, 0x100000, say_eax, sizeof(say_eax));
	ck_assert_int_eq(ioctl(cpu.fd, KVM_GET_LAPIC, &fresh), 0);
	run_until_out(0xf4);
	l = fresh;
	memcpy(l.regs + 0xf0, "\xff\x01\0\0", 4);       /* software-enabled */
	ck_assert_int_eq(ioctl(cpu.fd, KVM_SET_LAPIC, &l), 0);
	ck_assert(cpu_msr_write(&cpu, 0xc0000081, 0x0123000800000000));
	ck_assert(cpu_msr_write(&cpu, 0x4b564d01, 0x300001));
	ck_assert_int_eq(ioctl(cpu.fd, KVM_SET_DEBUGREGS, &d), 0);
	ck_assert_int_eq(ioctl(cpu.fd, KVM_SET_MP_STATE, &mp), 0);

	boot(BOOT_FLAT32, 0x100000, say_eax, sizeof(say_eax));
	ck_assert_int_eq(ioctl(cpu.fd, KVM_GET_LAPIC, &l), 0);
	ck_assert_mem_eq(l.regs + 0xf0, fresh.regs + 0xf0, 4);
	ck_assert(cpu_msr_read(&cpu, 0xc0000081, &star) && star == 0);
	ck_assert(cpu_msr_read(&cpu, 0x4b564d01, &clock) && clock == 0);
	ck_assert_int_eq(ioctl(cpu.fd, KVM_GET_MP_STATE, &mp), 0);
	ck_assert_uint_eq(mp.mp_state, KVM_MP_STATE_RUNNABLE);
	ck_assert_int_eq(ioctl(cpu.fd, KVM_GET_DEBUGREGS, &d), 0);
	ck_assert_uint_eq(d.db[0], 0);
	ck_assert_int_eq(ioctl(cpu.fd, KVM_GET_SREGS, &s), 0);
	ck_assert(s.efer == 0 && !(s.cr0 & CR0_PG));
	run_until_out(0xf4);
	close_vm();
}
END_TEST

/* mov $0xc0011fff, %ecx; wrmsr; mov $-1, %eax; rdmsr; out %eax, $0xf4 */
static const uint8_t odd_msr[] = { 0xb9, 0xff, 0x1f, 0x01, 0xc0, 0x0f, 0x30, 0xb8, 0xff, 0xff, 0xff, 0xff,
	0x0f, 0x32, 0xe7, 0xf4 };

START_TEST(test_row33_unknown_msrs_are_ignored_and_counted)
{
	open_vm();
	if (ioctl(vm.vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_X86_USER_SPACE_MSR) > 0) {
		boot(BOOT_FLAT64, 0x100000, odd_msr, sizeof(odd_msr));
		ck_assert_uint_eq(run_until_out(0xf4), 0);
		ck_assert_uint_eq(cpu.exits[EXIT_MSR], 2);
	}
	close_vm();
}
END_TEST

static const uint8_t cli_hlt[] = { 0xfa, 0xf4 }, sti_hlt[] = { 0xfb, 0xf4 };

/* The kick that vCPU threads use: immediate_exit lets a halted vCPU leave KVM_RUN at once. */
static void run_to_halt(void)
{
	struct kvm_mp_state mp = { 0 };
	struct kvm_guest_debug step = { .control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP };
	int r;

	r = ioctl(cpu.fd, KVM_SET_GUEST_DEBUG, &step);
	for (int i = 0; !r && i < 2; i++)
		ioctl(cpu.fd, KVM_RUN, 0);
	mp.mp_state = KVM_MP_STATE_HALTED;
	ck_assert_int_eq(ioctl(cpu.fd, KVM_SET_MP_STATE, &mp), 0);
}

START_TEST(test_dead_means_halted_with_interrupts_off)
{
	struct kvm_mp_state mp = { KVM_MP_STATE_UNINITIALIZED };

	open_vm();
	boot(BOOT_FLAT32, 0x100000, cli_hlt, sizeof(cli_hlt));
	ck_assert(!arch_vcpu_dead(&cpu));
	run_to_halt();
	ck_assert(arch_vcpu_dead(&cpu));
	ck_assert_int_eq(ioctl(cpu.fd, KVM_NMI, 0), 0);
	ck_assert(!arch_vcpu_dead(&cpu));
	boot(BOOT_FLAT32, 0x100000, sti_hlt, sizeof(sti_hlt));
	run_to_halt();
	ck_assert(!arch_vcpu_dead(&cpu));
	ck_assert_int_eq(ioctl(cpu.fd, KVM_SET_MP_STATE, &mp), 0);
	ck_assert(arch_vcpu_dead(&cpu));
	close_vm();
}
END_TEST

START_TEST(test_row32_dump_shows_mode_and_bytes)
{
	auto_free char *text = NULL;
	size_t len;
	uint8_t insn[15];
	uint64_t rip;
	FILE *f;

	open_vm();
	boot(BOOT_FLAT64, 0x100000, say_mb, sizeof(say_mb));
	f = open_memstream(&text, &len);
	arch_vcpu_dump(&cpu, f);
	fclose(f);
	ck_assert_msg(strstr(text, "64-bit mode") && strstr(text, "code 8b 03 e7 f4"), "%s", text);
	ck_assert_uint_eq(arch_vcpu_insn(&cpu, insn, 4, &rip), 4);
	ck_assert(rip == 0x100000 && !memcmp(insn, say_mb, 4));
	close_vm();
}
END_TEST

UNIT_MAIN("x86-kvm", test_every_protocol_reaches_its_first_instruction,
	test_reset_restores_power_on_state,
	test_row33_unknown_msrs_are_ignored_and_counted,
	test_dead_means_halted_with_interrupts_off,
	test_row32_dump_shows_mode_and_bytes)
