#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "formats.h"
#include "place.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define INITRD_ALIGN   4ull          /* where the kernel's unpacker looks for the next archive */
#define INITRD_LIMIT   (1ull << 32)  /* ramdisk_image and its size are 32 bits wide */
#define INITRD_MAX_DFL 0x37ffffffull /* boot protocol before 2.03 */

static int file_to_ram(
	const struct boot_file *f, const char *what, const char *path, void *dst, struct error *err)
{
	int r = boot_file_pread(f->fd, 0, dst, f->size);

	if (r == -ENODATA)
		return error_set(
			err, ENODATA, "%s '%s' became shorter while it was read", what, path);
	return r < 0 ? error_errno(err, -r, "cannot read %s '%s'", what, path) : 0;
}

/* Past the last byte an initrd may have. */
static gpa_t initrd_limit(const struct boot_image *out)
{
	uint64_t max = INITRD_LIMIT - 1;

	if (out->setup_header_len) {
		max = setup_get(out, SETUP_INITRD_MAX, 4);
		if (!max)
			max = INITRD_MAX_DFL;
	}
	return max + 1;
}

/* Past everything placed so far. */
static gpa_t used_end(const struct boot_image *out)
{
	gpa_t end = out->load_end;

	for (unsigned i = 0; i < out->nr_modules; i++)
		end = MAX(end, out->module[i].gpa + out->module[i].len);
	return end;
}

static uint64_t align4(uint64_t v)
{
	return (v + INITRD_ALIGN - 1) & ~(INITRD_ALIGN - 1);
}

int initrd_load(const struct boot_file *files, const char *const *paths, unsigned nr,
	const struct gmem *mem, struct boot_image *out, struct error *err)
{
	gpa_t at, limit = initrd_limit(out);
	uint64_t len = 0;
	uint8_t *dst;

	for (unsigned i = 0; i < nr; i++) {
		if (files[i].size >= INITRD_LIMIT - align4(len))
			return error_set(err, EFBIG,
				"initrd '%s' has %llu MiB: 4095 MiB is the most", paths[i],
				(unsigned long long)(files[i].size >> 20));
		len = align4(len) + files[i].size;
	}
	at = place_high(mem, len, limit, used_end(out));
	if (at == UINT64_MAX)
		return error_set(err, ENOSPC,
			"the initrd's %llu KiB do not fit between the kernel's end at %llu KiB and "
			"%llu KiB "
			"(--mem is %llu MiB): give more --mem",
			(unsigned long long)(len + 1023) >> 10,
			(unsigned long long)(out->load_end + 1023) >> 10,
			(unsigned long long)limit >> 10,
			(unsigned long long)(gmem_total(mem) >> 20));
	dst = gmem_at(mem, at, len);
	out->initrd = at;
	out->initrd_len = len;
	len = 0;
	for (unsigned i = 0; i < nr; i++) {
		int r;

		len = align4(len);
		r = file_to_ram(&files[i], "initrd", paths[i], dst + len, err);
		if (r < 0)
			return r;
		len += files[i].size;
	}
	return 0;
}

int module_spec_parse(const char *spec, char *path, size_t path_size, char *args, size_t args_size,
	struct error *err)
{
	const char *s = spec;
	size_t n = 0;

	for (; *s; s++) {
		if (*s == ',' && s[1] != ',')
			break;
		if (*s == ',')
			s++;
		if (n + 1 >= path_size)
			return error_set(err, ENAMETOOLONG, "--module: the file name is too long");
		path[n++] = *s;
	}
	path[n] = 0;
	if (!n)
		return error_set(err, EINVAL, "--module '%s': give FILE or FILE,args", spec);
	s += *s == ',';
	if (strlen(s) >= args_size)
		return error_set(err, EINVAL,
			"--module '%s': the arguments have %zu bytes, %zu is the most", path,
			strlen(s), args_size - 1);
	memcpy(args, s, strlen(s) + 1);
	return 0;
}

int modules_load(const struct boot_file *files, const char *const *specs, unsigned nr,
	const struct gmem *mem, struct boot_image *out, struct error *err)
{
	gpa_t from = out->load_end;

	for (unsigned i = 0; i < nr; i++) {
		struct boot_module *m = &out->module[i];
		char path[4096];
		gpa_t at;
		int r = module_spec_parse(
			specs[i], path, sizeof(path), m->args, sizeof(m->args), err);

		if (r < 0)
			return r;
		at = place_low(mem, files[i].size, from);
		if (at == UINT64_MAX)
			return error_set(err, ENOSPC,
				"module '%s' with its %llu KiB does not fit above %llu KiB (--mem "
				"is %llu MiB): "
				"give more --mem",
				path, (unsigned long long)(files[i].size + 1023) >> 10,
				(unsigned long long)from >> 10,
				(unsigned long long)(gmem_total(mem) >> 20));
		r = file_to_ram(&files[i], "module", path, gmem_at(mem, at, files[i].size), err);
		if (r < 0)
			return r;
		m->gpa = at;
		m->len = files[i].size;
		from = at + files[i].size;
		out->nr_modules = i + 1;
	}
	return 0;
}
