/* fw_cfg by its ports and by DMA. */
#include <endian.h>
#include <stdlib.h>
#include <unistd.h>
#include "devices/pc.h"
#include "machine.h"
#include "unit.h"
#include "vmm/cleanup.h"

#define DMA_AT  0x1000u
#define BUF_AT  0x2000u
#define FILE_LEN 5000u

static struct test_machine m;
static struct error err;

static void start(void)
{
	machine_init(&m);
	ck_assert_int_eq(fw_cfg_new(&m.vm, &err), 0);
}

static uint64_t item(uint16_t key, unsigned bytes)
{
	uint64_t val = 0;

	out_size(&m, 0x510, 2, key);
	for (unsigned i = 0; i < bytes; i++)
		val |= (uint64_t)inb(&m, 0x511) << 8 * i;
	return val;
}

/* One DMA request; returns the control word that came back. */
static uint32_t dma(uint32_t control, uint32_t len, uint64_t address)
{
	uint32_t words[4] = { htobe32(control), htobe32(len), htobe32((uint32_t)(address >> 32)),
		htobe32((uint32_t)address) };

	gmem_write(&m.vm.mem, DMA_AT, words, sizeof(words));
	out_size(&m, 0x514, 4, 0);
	out_size(&m, 0x518, 4, htobe32(DMA_AT));
	gmem_read(&m.vm.mem, DMA_AT, words, sizeof(words));
	return be32toh(words[0]);
}

#define READ(key) ((uint32_t)(key) << 16 | 0x08 | 0x02)

static uint8_t *at(uint64_t gpa)
{
	return gmem_at(&m.vm.mem, gpa, 1);
}

START_TEST(test_fwcfg_tells_signature_cpus_and_ram)
{
	start();
	ck_assert_uint_eq(item(0x00, 4), 0x554d4551);
	ck_assert_uint_eq(item(0x01, 4), 3);
	ck_assert_uint_eq(item(0x05, 2), 3);
	ck_assert_uint_eq(item(0x0f, 2), 3);
	ck_assert_uint_eq(item(0x03, 8), 33 << 20);
	ck_assert_uint_eq(item(0x05, 8), 3);            /* zeroes past the end */
	ck_assert_uint_eq(item(0x7777, 4), 0);
	ck_assert_uint_eq(item(0x08, 4), 0);            /* no kernel */
	ck_assert_uint_eq(in_size(&m, 0x514, 4), htobe32(0x51454d55));
	ck_assert_uint_eq(in_size(&m, 0x518, 4), htobe32(0x20434647));
	machine_done(&m);
}
END_TEST

START_TEST(test_fwcfg_dma_reads_skips_and_selects)
{
	start();
	ck_assert_uint_eq(dma(READ(0x00), 4, BUF_AT), 0);
	ck_assert_int_eq(memcmp(at(BUF_AT), "QEMU", 4), 0);
	ck_assert_uint_eq(dma(0x00 << 16 | 0x08, 0, 0), 0);
	ck_assert_uint_eq(dma(0x04, 2, 0), 0);
	memset(at(BUF_AT), 0xee, 8);
	ck_assert_uint_eq(dma(0x02, 4, BUF_AT), 0);
	ck_assert_int_eq(memcmp(at(BUF_AT), "MU\0\0\xee", 5), 0);
	ck_assert_uint_eq(dma(0x10, 4, BUF_AT), 1);     /* nothing is writable */
	machine_done(&m);
}
END_TEST

START_TEST(test_fwcfg_lists_the_memory_map_as_a_file)
{
	uint64_t addr, len;

	start();
	ck_assert_uint_eq(dma(READ(0x19), 68, BUF_AT), 0);
	ck_assert_int_eq(memcmp(at(BUF_AT), "\0\0\0\1\0\0\0\x28\0\x20\0\0etc/e820", 21), 0);
	ck_assert_uint_eq(dma(READ(0x20), 40, BUF_AT), 0);
	memcpy(&addr, at(BUF_AT + 20), 8);
	memcpy(&len, at(BUF_AT + 28), 8);
	ck_assert_uint_eq(addr, 1ull << 32);
	ck_assert_uint_eq(len, 1 << 20);
	ck_assert_uint_eq(*at(BUF_AT + 36), 1);
	machine_done(&m);
}
END_TEST

/* A kernel file whose bytes tell their place; with setup, it looks like a bzImage of 2 setup sectors. */
static void load_kernel(struct boot_config *boot, char *path, bool setup)
{
	uint8_t file[FILE_LEN];
	unsigned i;
	int fd = mkstemp(path);

	for (i = 0; i < FILE_LEN; i++)
		file[i] = (uint8_t)(i * 7 + i / 256);
	if (setup) {
		file[0x1f1] = 2;
		memcpy(file + 0x202, "HdrS", 4);
	}
	ck_assert_int_eq(write(fd, file, FILE_LEN), FILE_LEN);
	close(fd);
	for (i = 0; strcmp(loader_entries[i], "flat64"); i++)
		;
	*boot = (struct boot_config){
		.kernel = path, .cmdline = "", .entry = i, .load_address = 0x100000, .has_load_address = true
	};
	ck_assert_msg(loader_open(&m.vm.loader, boot, &err) == 0, "%s", err.msg);
	unlink(path);
}

START_TEST(test_fwcfg_streams_the_kernel_file)
{
	char path[] = "/tmp/test_fwcfg.XXXXXX";
	struct boot_config boot;

	start();
	load_kernel(&boot, path, false);
	ck_assert_uint_eq(item(0x08, 4), FILE_LEN);
	ck_assert_uint_eq(item(0x17, 4), 0);
	ck_assert_uint_eq(item(0x11, 3), 0x0e0700);
	memset(at(BUF_AT), 0xee, FILE_LEN + 8);
	ck_assert_uint_eq(dma(READ(0x11), FILE_LEN + 4, BUF_AT), 0);
	for (unsigned i = 0; i < FILE_LEN; i++)
		ck_assert_uint_eq(at(BUF_AT)[i], (uint8_t)(i * 7 + i / 256));
	ck_assert_int_eq(memcmp(at(BUF_AT + FILE_LEN), "\0\0\0\0\xee", 5), 0);
	loader_free(m.vm.loader);
	machine_done(&m);
}
END_TEST

START_TEST(test_fwcfg_splits_a_bzimage_after_its_setup)
{
	char path[] = "/tmp/test_fwcfg.XXXXXX";
	struct boot_config boot;
	unsigned first = 3 * 512;

	start();
	load_kernel(&boot, path, true);
	ck_assert_uint_eq(item(0x17, 4), first);
	ck_assert_uint_eq(item(0x08, 4), FILE_LEN - first);
	ck_assert_uint_eq(item(0x18, 2), 0x0700);
	ck_assert_uint_eq(item(0x11, 1), (uint8_t)(first * 7 + first / 256));
	loader_free(m.vm.loader);
	machine_done(&m);
}
END_TEST

START_TEST(test_fwcfg_gives_initrd_and_cmdline)
{
	start();
	m.vm.boot.cmdline = "quiet x=1";
	m.vm.boot.initrd = 0x300000;
	m.vm.boot.initrd_len = 6;
	memcpy(at(0x300000), "initrd", 6);
	ck_assert_uint_eq(item(0x14, 4), 10);
	ck_assert_uint_eq(dma(READ(0x15), 10, BUF_AT), 0);
	ck_assert_str_eq((char *)at(BUF_AT), "quiet x=1");
	ck_assert_uint_eq(item(0x0a, 4), 0x300000);
	ck_assert_uint_eq(item(0x0b, 4), 6);
	ck_assert_uint_eq(dma(READ(0x12), 6, BUF_AT), 0);
	ck_assert_int_eq(memcmp(at(BUF_AT), "initrd", 6), 0);
	machine_done(&m);
}
END_TEST

/* Rows 8 to 10: what a DMA address and length may not do. */
START_TEST(test_row8_fwcfg_dma_stays_in_ram)
{
	static const struct {
		uint64_t addr;
		uint32_t len;
	} bad[] = {
		{ 32 << 20, 4 },                /* past the end */
		{ (32 << 20) - 2, 4 },          /* across it */
		{ UINT64_MAX - 1, 4 },          /* wraps */
		{ 0xfec00000, 4 },              /* a device */
		{ BUF_AT, UINT32_MAX },
		{ BUF_AT, 4 + (1 << 20) + 1 },  /* more zeroes than are given at once */
		{ 1ull << 63, UINT32_MAX },
	};

	start();
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		memset(at(BUF_AT), 0xee, 8);
		ck_assert_uint_eq(dma(READ(0x00), bad[i].len, bad[i].addr), 1);
		ck_assert_uint_eq(*at(BUF_AT), 0xee);
	}
	ck_assert_uint_eq(dma(READ(0x00), 4 + (1 << 20), BUF_AT), 0);
	out_size(&m, 0x514, 4, 0xffffffff);             /* requests that are not in RAM */
	out_size(&m, 0x518, 4, 0xffffffff);
	out_size(&m, 0x514, 4, 0);
	out_size(&m, 0x518, 4, htobe32((32u << 20) - 8));
	ck_assert_uint_eq(dma(READ(0x00), 16, DMA_AT), 0);      /* over the request itself */
	m.vm.boot.initrd = 33 << 20;
	m.vm.boot.initrd_len = UINT64_MAX;
	ck_assert_uint_eq(item(0x12, 4), 0);
	machine_done(&m);
}
END_TEST

UNIT_MAIN("fwcfg", test_fwcfg_tells_signature_cpus_and_ram, test_fwcfg_dma_reads_skips_and_selects,
	test_fwcfg_lists_the_memory_map_as_a_file, test_fwcfg_streams_the_kernel_file,
	test_fwcfg_splits_a_bzimage_after_its_setup, test_fwcfg_gives_initrd_and_cmdline,
	test_row8_fwcfg_dma_stays_in_ram)
