/* The boot information of each protocol, read with suspicion: what a kernel would trust is checked first. */
#include "rt.h"

static void region(struct boot_facts *f, uint64_t base, uint64_t len, uint32_t type)
{
	static uint64_t end;

	CHECK(len && base + len > base);
	CHECK(base >= end);             /* sorted, nothing overlaps */
	end = base + len;
	CHECK(type >= 1 && type <= 5);
	if (type == 1)
		f->ram += len;
	f->regions++;
}

static void module(struct boot_facts *f, uintptr_t start, uint32_t len, const char *args)
{
	CHECK(f->nr_modules < 32);
	f->module[f->nr_modules].start = (const char *)start;
	f->module[f->nr_modules].len = len;
	f->module[f->nr_modules++].args = args;
}

void facts_multiboot1(struct boot_facts *f, uintptr_t info)
{
	const uint32_t *i = (const uint32_t *)info, *m;

	CHECK((i[0] & 0x24d) == 0x24d); /* memory, command line, modules, map, loader name */
	CHECK(i[1] >= 600 && i[1] <= 640);
	f->cmdline = (const char *)(uintptr_t)i[4];
	m = (const uint32_t *)(uintptr_t)i[6];
	for (uint32_t n = 0; n < i[5]; n++, m += 4)
		module(f, m[0], m[1] - m[0], (const char *)(uintptr_t)m[2]);
	for (uint32_t at = 0; at < i[11];) {
		const uint32_t *e = (const uint32_t *)(uintptr_t)(i[12] + at);

		region(f, e[1] | (uint64_t)e[2] << 32, e[3] | (uint64_t)e[4] << 32, e[5]);
		at += e[0] + 4;
	}
	CHECK(same((const char *)(uintptr_t)i[16], "vmm"));
}

static void map_of_24(struct boot_facts *f, const uint32_t *e, unsigned n)
{
	for (; n; n--, e += 6)
		region(f, e[0] | (uint64_t)e[1] << 32, e[2] | (uint64_t)e[3] << 32, e[4]);
}

void facts_multiboot2(struct boot_facts *f, uintptr_t info)
{
	uintptr_t end = info + read32(info), at = info + 8;
	unsigned seen = 0;

	for (; read32(at); at = (at + read32(at + 4) + 7) & ~7ul) {
		const uint32_t *t = (const uint32_t *)at;

		CHECK(at < end && t[1] >= 8);
		seen |= 1u << t[0];
		if (t[0] == 1)
			f->cmdline = (const char *)(t + 2);
		if (t[0] == 3)
			module(f, t[2], t[3] - t[2], (const char *)(t + 4));
		if (t[0] == 6) {
			CHECK(t[2] == 24);
			map_of_24(f, t + 4, (t[1] - 16) / 24);
		}
		if (t[0] == 15)
			f->rsdp = at + 8;
	}
	CHECK(at + 8 == end);
	CHECK((seen & 0x8056) == 0x8056);       /* command line, loader, basic memory, map, ACPI */
}

void facts_pvh(struct boot_facts *f, uintptr_t info)
{
	const uint32_t *i = (const uint32_t *)info, *m;

	CHECK(i[0] == 0x336ec578 && i[1] == 1);
	m = (const uint32_t *)(uintptr_t)i[4];
	for (uint32_t n = 0; n < i[3]; n++, m += 8)
		module(f, m[0], m[2], (const char *)(uintptr_t)m[4]);
	f->cmdline = (const char *)(uintptr_t)i[6];
	f->rsdp = i[8];
	map_of_24(f, (const uint32_t *)(uintptr_t)i[10], i[12]);
}

void facts_linux(struct boot_facts *f, uintptr_t zp)
{
	const uint8_t *z = (const uint8_t *)zp;
	unsigned n = z[0x1e8];

	CHECK(read32(zp + 0x202) == 0x53726448);        /* HdrS */
	CHECK(z[0x210] == 0xff);
	f->cmdline = (const char *)(uintptr_t)read32(zp + 0x228);
	f->rsdp = read32(zp + 0x70);
	for (unsigned i = 0; i < n; i++) {
		uint32_t e[5];

		memcpy(e, z + 0x2d0 + i * 20, 20);
		region(f, e[0] | (uint64_t)e[1] << 32, e[2] | (uint64_t)e[3] << 32, e[4]);
	}
	if (read32(zp + 0x21c))
		module(f, read32(zp + 0x218), read32(zp + 0x21c), NULL);
	CHECK(read32(read32(zp + 0x250) + 8) == 9);     /* setup data: the seed */
}

static void check_modules(const struct boot_facts *f)
{
	CHECK(f->nr_modules == option(f->cmdline, "modules=", f->nr_modules));
	for (unsigned i = 0; i < f->nr_modules; i++) {
		CHECK(f->module[i].len > 10 && starts(f->module[i].start, "vmm module"));
		say("module ");
		say(f->module[i].args ? f->module[i].args : "");
		say("\n");
	}
	if (option(f->cmdline, "length=", 0)) {
		CHECK(f->module[0].len == option(f->cmdline, "length=", 0));
		CHECK((uint8_t)f->module[0].start[f->module[0].len - 1] == option(f->cmdline, "last=", 0));
	}
}

void facts_check(const struct boot_facts *f)
{
	unsigned long mib = option(f->cmdline, "ram=", 0);

	say("cmdline ");
	say(f->cmdline);
	say("\n");
	CHECK(starts(f->cmdline, "test=1"));
	CHECK(f->regions >= 3);
	/* What lies between the extended BIOS data and 1 MiB is not RAM to a kernel. */
	CHECK(!mib || (f->ram <= (uint64_t)mib << 20 && f->ram >= ((uint64_t)mib << 20) - (400 << 10)));
	CHECK(!f->rsdp || starts((const char *)f->rsdp, "RSD PTR "));
	check_modules(f);
	say("ok\n");
	leave(0);
}
