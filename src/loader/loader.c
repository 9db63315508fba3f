#include "vmm/loader.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "formats.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define INITRDS_MAX  32
#define UNPACK_SLACK (16ull << 20) /* what a compressed image may have besides its loaded bytes */

/* A format is one file and one line here. The first to say "mine" has it. */
static const struct loader_class *const loaders[] = {
	&bzimage_loader,
	&multiboot2_loader,
	&multiboot_loader,
	&elf_loader,
	&flat_loader,
};

const char *const loader_entries[] = { [ENTRY_AUTO] = "auto",
	[ENTRY_UNPACK] = "unpack",
	[ENTRY_BZIMAGE] = "bzimage",
	[ENTRY_BZIMAGE32] = "bzimage32",
	[ENTRY_PVH] = "pvh",
	[ENTRY_LINUX64] = "linux64",
	[ENTRY_MULTIBOOT] = "multiboot",
	[ENTRY_MULTIBOOT2] = "multiboot2",
	[ENTRY_FLAT16] = "flat16",
	[ENTRY_FLAT32] = "flat32",
	[ENTRY_FLAT64] = "flat64",
	[ENTRY_COUNT] = NULL };

struct loader {
	struct boot_config cfg;
	const struct loader_class *class;
	struct boot_file kernel, initrd[INITRDS_MAX], module[BOOT_MODULES];
};

void format_set(struct boot_image *out, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(out->format_buf, sizeof(out->format_buf), fmt, ap);
	va_end(ap);
	out->format = out->format_buf;
}

uint32_t setup_get(const struct boot_image *out, unsigned off, unsigned size)
{
	uint32_t v = 0;

	for (unsigned i = 0; i < size && off - SETUP_HEADER + i < out->setup_header_len; i++)
		v |= (uint32_t)out->setup_header[off - SETUP_HEADER + i] << 8 * i;
	return v;
}

void setup_put(struct boot_image *out, unsigned off, unsigned size, uint64_t val)
{
	for (unsigned i = 0; i < size && off - SETUP_HEADER + i < out->setup_header_len; i++)
		out->setup_header[off - SETUP_HEADER + i] = (uint8_t)(val >> 8 * i);
}

static bool entry_is_flat(enum loader_entry entry)
{
	return entry == ENTRY_FLAT16 || entry == ENTRY_FLAT32 || entry == ENTRY_FLAT64;
}

/* Open the kernel's plain bytes. ram: what a compressed one may unfold to. */
static int image_open(const struct loader *ld, struct image *img, uint64_t ram, struct error *err)
{
	*img = (struct image){ .cfg = &ld->cfg, .entry = ld->cfg.entry, .file = ld->kernel };
	return source_open(&img->src, ld->kernel.fd, 0, ld->kernel.size,
		entry_is_flat(img->entry) ? 0 : ram, err);
}

/* Nobody took it: say what it is. */
static int refuse_unknown(const struct image *img, struct error *err)
{
	const char *packed = img->src.compression, *holding = packed ? " file holding " : "";
	struct finding f;

	identify(img->src.head, img->src.head_len, packed, &f);
	return error_set(err, ENOEXEC,
		"found %s%s%s%s; accepted are a Linux bzImage, an x86 ELF (PVH, Linux, Multiboot), "
		"Multiboot 1 "
		"and 2, these ELFs compressed by gzip, xz, zstd or lz4, and flat binaries: %s",
		packed ? (strchr("xl", packed[0]) ? "an " : "a ") : "", packed ? packed : "",
		holding, f.what, f.fix);
}

/* It is a kernel of another format than --kernel-entry names: list the words that fit. */
static int refuse_entry(const struct loader_class *c, const struct image *img, struct error *err)
{
	char words[160] = "";

	for (unsigned i = 0; i < ENTRY_COUNT; i++)
		if (c->entries >> i & 1) {
			size_t n = strlen(words);

			snprintf(words + n, sizeof(words) - n, "%s%s", n ? ", " : "",
				loader_entries[i]);
		}
	return error_set(err, EINVAL, "found %s, which has no '%s' entry: --kernel-entry can be %s",
		c->name, loader_entries[img->entry], words);
}

static int flat_or_not(const struct loader_class *c, const struct image *img, struct error *err)
{
	if (!img->cfg->has_load_address || c == &flat_loader)
		return 0;
	return error_set(err, EINVAL,
		"found %s, which says itself where it goes: leave --load-address out, or add "
		"--kernel-entry=flat16, flat32 or flat64",
		c->name);
}

static int choose(struct image *img, const struct loader_class **ret, struct error *err)
{
	enum loader_entry wanted = img->entry;

	for (size_t i = 0; i < ARRAY_LEN(loaders); i++) {
		int r = loaders[i]->entries >> wanted & 1 ? loaders[i]->probe(img, err) : 0;

		if (r > 0) {
			*ret = loaders[i];
			return flat_or_not(loaders[i], img, err);
		}
		if (r < 0)
			return r;
	}
	img->entry = ENTRY_AUTO;
	for (size_t i = 0; i < ARRAY_LEN(loaders); i++) {
		if (wanted == ENTRY_AUTO || loaders[i]->probe(img, NULL) == 0)
			continue;
		img->entry = wanted;
		return refuse_entry(loaders[i], img, err);
	}
	return refuse_unknown(img, err);
}

/* The boot protocol's limit is checked when the kernel's is known; this much fits none. */
static int cmdline_check(const char *cmdline, size_t max, struct error *err)
{
	size_t len = cmdline ? strlen(cmdline) : 0;

	if (len > max)
		return error_set(err, E2BIG,
			"the kernel command line has %zu bytes, this kernel takes %zu", len, max);
	if (cmdline && strpbrk(cmdline, "\n\r"))
		return error_set(err, EINVAL, "the kernel command line has a line break in it");
	return 0;
}

static int extras_open(struct loader *ld, struct error *err)
{
	const struct boot_config *cfg = &ld->cfg;

	if (cfg->nr_initrds > INITRDS_MAX)
		return error_set(
			err, E2BIG, "%u --initrd: %u is the most", cfg->nr_initrds, INITRDS_MAX);
	if (cfg->nr_modules > BOOT_MODULES)
		return error_set(
			err, E2BIG, "%u --module: %u is the most", cfg->nr_modules, BOOT_MODULES);
	for (unsigned i = 0; i < cfg->nr_initrds; i++) {
		int r = boot_file_open(&ld->initrd[i], "initrd", cfg->initrds[i], err);

		if (r < 0)
			return r;
	}
	for (unsigned i = 0; i < cfg->nr_modules; i++) {
		char path[4096], args[sizeof(((struct boot_module *)0)->args)];
		int r = module_spec_parse(
			cfg->modules[i], path, sizeof(path), args, sizeof(args), err);

		if (!r)
			r = boot_file_open(&ld->module[i], "module", path, err);
		if (r < 0)
			return r;
	}
	return 0;
}

static int kernel_open(struct loader *ld, struct error *err)
{
	struct image img;
	int r;

	if (!ld->cfg.kernel)
		return error_set(err, EINVAL, "no kernel is given: add --kernel FILE");
	if (ld->cfg.entry >= ENTRY_COUNT)
		return error_set(err, EINVAL, "--kernel-entry: no such entry");
	r = boot_file_open(&ld->kernel, "kernel", ld->cfg.kernel, err);
	if (r < 0)
		return r;
	r = image_open(ld, &img, UINT32_MAX, err);
	if (!r)
		r = choose(&img, &ld->class, err);
	source_close(&img.src);
	if (r < 0)
		error_prefix(err, "kernel '%s': ", ld->cfg.kernel);
	return r;
}

int loader_open(struct loader **ret, const struct boot_config *cfg, struct error *err)
{
	struct loader *ld = calloc(1, sizeof(*ld));
	int r;

	if (!ld)
		return error_errno(err, ENOMEM, "cannot load a kernel");
	ld->cfg = *cfg;
	ld->kernel.fd = -1;
	for (unsigned i = 0; i < INITRDS_MAX; i++)
		ld->initrd[i].fd = -1;
	for (unsigned i = 0; i < BOOT_MODULES; i++)
		ld->module[i].fd = -1;
	r = cmdline_check(cfg->cmdline, BOOT_CMDLINE_MAX - 1, err);
	if (!r)
		r = kernel_open(ld, err);
	if (!r)
		r = extras_open(ld, err);
	if (r < 0) {
		loader_free(ld);
		return r;
	}
	*ret = ld;
	return 0;
}

void loader_free(struct loader *ld)
{
	if (!ld)
		return;
	boot_file_close(&ld->kernel);
	for (unsigned i = 0; i < INITRDS_MAX; i++)
		boot_file_close(&ld->initrd[i]);
	for (unsigned i = 0; i < BOOT_MODULES; i++)
		boot_file_close(&ld->module[i]);
	free(ld);
}

/* Flat binaries in protected mode are told about both as PVH kernels are. */
static bool takes_initrd(enum boot_protocol p)
{
	return p != BOOT_MULTIBOOT1 && p != BOOT_MULTIBOOT2 && p != BOOT_FLAT16;
}

static bool takes_modules(enum boot_protocol p)
{
	return p != BOOT_LINUX64 && p != BOOT_LINUX32 && p != BOOT_FLAT16;
}

static int extras_load(
	struct loader *ld, const struct gmem *mem, struct boot_image *out, struct error *err)
{
	const struct boot_config *cfg = &ld->cfg;
	int r = 0;

	if (cfg->nr_initrds && !takes_initrd(out->protocol))
		return error_set(err, EINVAL, "kernel '%s' is %s and takes no --initrd%s",
			cfg->kernel, out->format,
			takes_modules(out->protocol) ? ": use --module" : "");
	if (cfg->nr_modules && !takes_modules(out->protocol))
		return error_set(err, EINVAL, "kernel '%s' is %s and takes no --module%s",
			cfg->kernel, out->format,
			takes_initrd(out->protocol) ? ": use --initrd" : "");
	if (out->setup_header_len) {
		r = cmdline_check(cfg->cmdline, setup_get(out, SETUP_CMDLINE_SIZE, 4), err);
		if (r < 0)
			return r;
	}
	if (cfg->nr_modules)
		r = modules_load(ld->module, cfg->modules, cfg->nr_modules, mem, out, err);
	if (!r && cfg->nr_initrds)
		r = initrd_load(ld->initrd, cfg->initrds, cfg->nr_initrds, mem, out, err);
	return r;
}

int loader_load(
	struct loader *ld, const struct gmem *mem, struct boot_image *out, struct error *err)
{
	struct image img;
	int r;

	*out = (struct boot_image){ .cmdline = ld->cfg.cmdline ? ld->cfg.cmdline : "" };
	r = image_open(ld, &img, gmem_total(mem) + UNPACK_SLACK, err);
	if (!r)
		r = ld->class->load(&img, mem, out, err);
	source_close(&img.src);
	if (r < 0) {
		error_prefix(err, "kernel '%s': ", ld->cfg.kernel);
		return r;
	}
	return extras_load(ld, mem, out, err);
}

int loader_kernel_fd(const struct loader *ld, uint64_t *size)
{
	*size = ld->kernel.size;
	return ld->kernel.fd;
}
