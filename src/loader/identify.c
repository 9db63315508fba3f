/* What a file that is no kernel seems to be, for the message that refuses it. */
#include <string.h>
#include "formats.h"
#include "vmm/cleanup.h"

#define USE_DISK   "a disk goes to --disk; --kernel wants the kernel file"
#define FLAT_HINT  "a flat binary needs --load-address, or --kernel-entry=flat16, flat32 or flat64"
#define UNPACK_PKG "unpack it (dpkg -x, rpm2cpio, tar) and give the kernel in it"

static const struct signature {
	unsigned off, len;
	const char *bytes, *what, *fix;
} signatures[] = {
	{ 0x8001, 5, "CD001", "an ISO image", "give the kernel file in it, and the ISO to --disk" },
	{ 0, 4, "QFI\xfb", "a qcow2 image", USE_DISK },
	{ 0x40, 4, "\x7f\x10\xda\xbe", "a VDI image", USE_DISK },
	{ 0, 4, "KDMV", "a VMDK image", USE_DISK },
	{ 0, 8, "vhdxfile", "a VHDX image", USE_DISK },
	{ 0, 4, "hsqs", "a squashfs image", USE_DISK },
	{ 0x438, 2, "\x53\xef", "an ext2/3/4 file system", USE_DISK },
	{ 0x38, 4, "ARM\x64", "a Linux kernel for aarch64", "give a kernel built for x86" },
	{ 0x30, 5, "RISCV", "a Linux kernel for riscv", "give a kernel built for x86" },
	{ 0x24, 4, "\x18\x28\x6f\x01", "a Linux zImage for arm", "give a kernel built for x86" },
	{ 0, 4, "\x27\x05\x19\x56", "a U-Boot image", "give the kernel without its wrapper" },
	{ 0, 4, "\xd0\x0d\xfe\xed", "a device tree or FIT image", "give a kernel" },
	{ 0, 5, "07070", "a cpio archive", "an initramfs goes to --initrd" },
	{ 0, 8, "!<arch>\n", "an ar archive or Debian package", UNPACK_PKG },
	{ 0, 4, "\xed\xab\xee\xdb", "an RPM package", UNPACK_PKG },
	{ 257, 5, "ustar", "a tar archive", UNPACK_PKG },
	{ 0, 4, "PK\3\4", "a zip archive", UNPACK_PKG },
	{ 0, 3, "BZh", "a bzip2 file", "unpack it with bunzip2" },
	{ 0, 4, "\x89LZO", "an lzop file", "unpack it with lzop -d" },
	{ 0, 2, "#!", "a script", "give a kernel" },
	{ 0x202, 4, "HdrS", "a Linux bzImage", "decompress it first" },
	{ 0, 2, "MZ", "a PE program without the Linux header",
		"give the bzImage itself; of a unified kernel image, its .linux section" },
	{ 1, 3, "ELF", "an ELF", "give an x86 kernel" },
	{ 0x1fe, 2, "\x55\xaa", "a boot sector or a partitioned disk",
		USE_DISK "; a boot sector runs with --kernel-entry=flat16" },
};

static bool is_text(const uint8_t *head, size_t len)
{
	for (size_t i = 0; i < MIN(len, 512); i++)
		if ((head[i] < ' ' && !strchr("\t\n\r\f\x1b", head[i])) || !head[i] ||
			head[i] == 0x7f)
			return false;
	return len > 0;
}

void identify(const uint8_t *head, size_t len, bool packed, struct finding *f)
{
	for (size_t i = 0; i < ARRAY_LEN(signatures); i++) {
		const struct signature *s = &signatures[i];

		if (len >= s->off + s->len && !memcmp(head + s->off, s->bytes, s->len)) {
			*f = (struct finding){ s->what, s->fix };
			return;
		}
	}
	*f = (struct finding){ "unknown data", packed ? "decompress it to see" : FLAT_HINT };
	if (is_text(head, len))
		*f = (struct finding){ "a text file", "give a kernel" };
}
