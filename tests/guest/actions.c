/* The ways a guest can end, or not: "do=NAME" on the command line picks one. 32-bit, Multiboot 1. */
#include "rt.h"

static const char *cmdline;

static void poweroff(void)
{
	outw(0x604, 0x2000);
}

static void reset_cf9(void)
{
	outb(0xcf9, 2);
	outb(0xcf9, 6);
}

static void reset_acpi(void)
{
	outb(0xcf9, 6);
}

static void reset_8042(void)
{
	outb(0x64, 0xfe);
}

static void triple_fault(void)
{
	static const struct {
		uint16_t limit;
		uint32_t base;
	} __attribute__((packed)) none = { 0, 0 };

	__asm__ volatile("lidt %0; ud2" : : "m"(none));
}

static void cli_hlt(void)
{
	for (;;)
		__asm__ volatile("cli; hlt");
}

static void nothing(void)
{
}

/* Asleep with interrupts on is not dead, though none is unmasked. */
static void sti_hlt(void)
{
	irq_install(0x20, nothing);
	for (;;)
		__asm__ volatile("sti; hlt");
}

static void spin(void)
{
	for (;;)
		__asm__ volatile("pause");
}

static void value(void)
{
	leave(option(cmdline, "value=", 0));
}

/* Code where there is no memory: KVM can fetch no instruction, on any host. */
static void run_hole(void)
{
	((void (*)(void))0xd8000000)();
}

/* Instructions that software KVM does not interpret: hosts with hardware KVM end with 0. */
static void int3(void)
{
	irq_install(3, nothing);
	__asm__ volatile("int3");
	leave(0);
}

static void sse(void)
{
	uint32_t cr4;

	__asm__ volatile("mov %%cr4, %0" : "=r"(cr4));
	__asm__ volatile("mov %0, %%cr4; xorps %%xmm0, %%xmm0" : : "r"(cr4 | 0x200));
	leave(0);
}

static void panic(void)
{
	say("[    1.234567] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\n");
	say("[    1.234568] CPU: 0 PID: 1 Comm: init\n");
	say("[    1.234569] ---[ end Kernel panic - not syncing: Attempted to kill init! ]---\n");
	spin();
}

/* What a hostile guest would like to do to the terminal of whoever reads about its panic. */
static void panic_escape(void)
{
	say("Kernel panic - not syncing: \033]0;owned\007\033[31m\302\2332J\n");
	spin();
}

static void pvpanic(void)
{
	outb(0x505, 1);
	spin();
}

/* Bytes from the serial port come back until a 'q'. */
static void echo(void)
{
	for (;;) {
		uint8_t c;

		while (!(inb(COM1 + 5) & 1))
			;
		c = inb(COM1);
		outb(COM1, c);
		if (c == 'q')
			leave(0);
	}
}

/* Which port a byte came from, until a 'q'. */
static void which(void)
{
	char line[] = "N:C\n";

	say("ready\n");
	for (;;) {
		uint16_t port = inb(COM1 + 5) & 1 ? COM1 : COM2;

		if (port == COM2 && !(inb(COM2 + 5) & 1))
			continue;
		line[0] = port == COM1 ? '1' : '2';
		line[2] = inb(port);
		say(line);
		if (line[2] == 'q')
			leave(0);
	}
}

/* A break on the line is a zero byte, marked in the line status. */
static void serial_break(void)
{
	say("ready\n");
	while (!(inb(COM1 + 5) & 0x10))
		;
	leave(0);
}

static void com2(void)
{
	for (const char *s = "second port\n"; *s; s++)
		outb(COM2, *s);
	leave(0);
}

static void debugcon(void)
{
	CHECK(inb(0xe9) == 0xe9);
	for (const char *s = "through 0xe9\n"; *s; s++)
		outb(0xe9, *s);
	leave(0);
}

/* "kib=N" KiB of output as fast as it goes, numbered in lines of 32 bytes, then "end". */
static void flood(void)
{
	static char block[1024];

	for (unsigned kib = option(cmdline, "kib=", 1), n = 0; n < kib; n++) {
		const char *at = block;
		unsigned len = sizeof(block);

		for (unsigned i = 0; i < sizeof(block); i++)
			block[i] = i % 32 == 31 ? '\n' : "0123456789abcdef"[(n * 32 + i / 32) >> (28 - i % 8 * 4) & 15];
		__asm__ volatile("rep outsb" : "+S"(at), "+c"(len) : "d"(COM1) : "memory");
	}
	say("end\n");
	leave(0);
}

static uint32_t fw_cfg_read(uint16_t key, unsigned bytes)
{
	uint32_t v = 0;

	outw(0x510, key);
	for (unsigned i = 0; i < bytes; i++)
		v |= (uint32_t)inb(0x511) << 8 * i;
	return v;
}

/* Keys of the traditional interface: signature, RAM size, CPUs, the command line. */
static void fw_cfg(void)
{
	uint32_t len;

	CHECK(fw_cfg_read(0, 4) == 0x554d4551);         /* "QEMU" */
	CHECK(fw_cfg_read(3, 4) == option(cmdline, "ram=", 0) << 20);
	CHECK(fw_cfg_read(5, 2) == option(cmdline, "cpus=", 1));
	len = fw_cfg_read(0x14, 4);
	outw(0x510, 0x15);
	for (uint32_t i = 0; i < len; i++)
		CHECK(inb(0x511) == (uint8_t)cmdline[i]);
	CHECK(len && !cmdline[len - 1] && inb(0x511) == 0);
	leave(0);
}

/* pc-testdev: ports that remember, and memory. */
static void testdev(void)
{
	outl(0xe0, 0x12345678);
	CHECK(inl(0xe0) == 0x12345678 && inb(0xe1) == 0x56);
	write32(0xff000010, 0xcafe);
	CHECK(read32(0xff000010) == 0xcafe);
	leave(0);
}

/* A kernel that listens to its power button (PM1_EN), and goes or stays when it is pressed (PM1_STS). */
static void button(void)
{
	outw(0x602, 0x100);
	say("listening\n");
	while (!(inw(0x600) & 0x100))
		;
	say("pressed\n");
	if (!word(cmdline, "stay"))
		poweroff();
}

static uint8_t cmos_read(uint8_t reg)
{
	outb(0x70, reg);
	return inb(0x71);
}

static void cmos_write(uint8_t reg, uint8_t v)
{
	outb(0x70, reg);
	outb(0x71, v);
}

/* Memory is gone after a reset, the clock goes on: how often the machine has started is in its year. */
static void reboot(void)
{
	uint8_t year = cmos_read(0x09), n = year >= 0x90 ? year - 0x90 + 1 : 1;

	say_hex("start", n);
	if (n >= option(cmdline, "starts=", 3))
		leave(0);
	cmos_write(0x0b, 0x82);         /* the clock stands, 24 hours */
	cmos_write(0x09, 0x90 + n);
	cmos_write(0x0b, 0x02);
	reset_cf9();
}

static void rtc(void)
{
	uint8_t year = cmos_read(0x09), month = cmos_read(0x08);

	CHECK(year >= 0x20 && month >= 1 && month <= 0x12);
	CHECK(cmos_read(0x0d) & 0x80);  /* the battery is good */
	leave(0);
}

static void pit_tick(void)
{
	outb(0x20, 0x20);
}

static void pit(void)
{
	irq_install(0x20, pit_tick);
	outb(0x43, 0x34);
	outb(0x40, 11932 & 0xff);       /* 100 Hz */
	outb(0x40, 11932 >> 8);
	outb(0x21, 0xfe);
	while (irq_count < 3)
		__asm__ volatile("sti; hlt; cli");
	leave(0);
}

/* Every port in three widths, but those that end the run or change the interrupt controllers. */
static bool ends_the_run(uint32_t port)
{
	return (port >= 0x60 && port <= 0x64) || (port >= 0x90 && port <= 0x92) || port / 4 == 0xf4 / 4 ||
		(port >= 0xf1 && port <= 0xf4) || (port >= 0x502 && port <= 0x505) ||
		(port >= 0x600 && port <= 0x60b) || (port >= 0xcf6 && port <= 0xcff) ||
		(port >= 0x3f5 && port <= 0x3ff) || port < 0x50;
}

static void ports(void)
{
	uint32_t first = option(cmdline, "first=", 0), last = option(cmdline, "last=", 0xffff);

	for (uint32_t port = first; port <= last; port++) {
		inb(port);
		if (port < 0xffff)
			inw(port);
		if (port < 0xfffd)
			inl(port);
		if (ends_the_run(port))
			continue;
		outb(port, 0xff);
		if (port < 0xffff)
			outw(port, 0xffff);
		if (port < 0xfffd)
			outl(port, 0xffffffff);
	}
	leave(0);
}

/* Holes read as all ones and take writes; ECAM answers for the bridge and for absent devices. */
static void mmio(void)
{
	for (uintptr_t at = 0xd4000000; at < 0xe0000000; at += 0x400000) {
		CHECK(read32(at) == 0xffffffff);
		CHECK(*(volatile uint8_t *)(at + 1) == 0xff);
		write32(at, 0);
		CHECK(read32(at) == 0xffffffff);
	}
	for (uint32_t slot = 0; slot < 32; slot++) {
		uint32_t id = read32(0xe0000000 + (slot << 15));

		CHECK(slot || id != 0xffffffff);
		CHECK(read32(0xe0000000 + (slot << 15) + (1 << 12)) == 0xffffffff);
		outl(0xcf8, 0x80000000 | slot << 11);
		CHECK(inl(0xcfc) == id);
	}
	leave(0);
}

static const struct {
	const char *name;
	void (*run)(void);
} actions[] = { { "do=poweroff", poweroff }, { "do=reset-cf9", reset_cf9 }, { "do=reset-acpi", reset_acpi },
	{ "do=reset-8042", reset_8042 }, { "do=triple-fault", triple_fault }, { "do=cli-hlt", cli_hlt },
	{ "do=sti-hlt", sti_hlt }, { "do=spin", spin }, { "do=value", value }, { "do=run-hole", run_hole },
	{ "do=int3", int3 }, { "do=sse", sse }, { "do=panic", panic }, { "do=pvpanic", pvpanic },
	{ "do=echo", echo }, { "do=reboot", reboot }, { "do=rtc", rtc }, { "do=pit", pit },
	{ "do=ports", ports }, { "do=mmio", mmio }, { "do=panic-escape", panic_escape },
	{ "do=which", which }, { "do=break", serial_break }, { "do=com2", com2 },
	{ "do=debugcon", debugcon }, { "do=flood", flood }, { "do=fw-cfg", fw_cfg },
	{ "do=testdev", testdev }, { "do=button", button } };

int payload(unsigned long ax, unsigned long bx, unsigned long si)
{
	(void)ax, (void)si;
	cmdline = (const char *)(uintptr_t)read32(bx + 16);
	for (size_t i = 0; i < sizeof(actions) / sizeof(actions[0]); i++) {
		if (!word(cmdline, actions[i].name))
			continue;
		say(actions[i].name);
		say("\n");
		actions[i].run();
		spin();         /* until what was asked for takes effect */
	}
	say("no such action\n");
	return 2;
}
