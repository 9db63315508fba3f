/*
 * The names of CPU features, as /proc/cpuinfo of Linux has them, and where CPUID keeps them (Intel SDM 2A,
 * CPUID; AMD APM 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst for the 0x40000001 leaf).
 */
#include "cpuid.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/opts.h"

/* A feature stands after the one it needs, so that one pass clears whole chains. */
const struct cpu_feature cpu_features[] = {
	{ "fpu", 0x1, 0, CPUID_EDX, 0, NULL },
	{ "vme", 0x1, 0, CPUID_EDX, 1, NULL },
	{ "de", 0x1, 0, CPUID_EDX, 2, NULL },
	{ "pse", 0x1, 0, CPUID_EDX, 3, NULL },
	{ "tsc", 0x1, 0, CPUID_EDX, 4, NULL },
	{ "msr", 0x1, 0, CPUID_EDX, 5, NULL },
	{ "pae", 0x1, 0, CPUID_EDX, 6, NULL },
	{ "mce", 0x1, 0, CPUID_EDX, 7, NULL },
	{ "cx8", 0x1, 0, CPUID_EDX, 8, NULL },
	{ "apic", 0x1, 0, CPUID_EDX, 9, NULL },
	{ "sep", 0x1, 0, CPUID_EDX, 11, NULL },
	{ "mtrr", 0x1, 0, CPUID_EDX, 12, NULL },
	{ "pge", 0x1, 0, CPUID_EDX, 13, NULL },
	{ "mca", 0x1, 0, CPUID_EDX, 14, NULL },
	{ "cmov", 0x1, 0, CPUID_EDX, 15, NULL },
	{ "pat", 0x1, 0, CPUID_EDX, 16, NULL },
	{ "pse36", 0x1, 0, CPUID_EDX, 17, NULL },
	{ "clflush", 0x1, 0, CPUID_EDX, 19, NULL },
	{ "acpi", 0x1, 0, CPUID_EDX, 22, NULL },
	{ "mmx", 0x1, 0, CPUID_EDX, 23, NULL },
	{ "fxsr", 0x1, 0, CPUID_EDX, 24, NULL },
	{ "sse", 0x1, 0, CPUID_EDX, 25, "fxsr" },
	{ "sse2", 0x1, 0, CPUID_EDX, 26, "sse" },
	{ "ss", 0x1, 0, CPUID_EDX, 27, NULL },
	{ "ht", 0x1, 0, CPUID_EDX, 28, NULL },
	{ "pni", 0x1, 0, CPUID_ECX, 0, "sse2" },
	{ "pclmulqdq", 0x1, 0, CPUID_ECX, 1, "sse2" },
	{ "monitor", 0x1, 0, CPUID_ECX, 3, NULL },
	{ "vmx", 0x1, 0, CPUID_ECX, 5, NULL },
	{ "ssse3", 0x1, 0, CPUID_ECX, 9, "pni" },
	{ "cx16", 0x1, 0, CPUID_ECX, 13, NULL },
	{ "pdcm", 0x1, 0, CPUID_ECX, 15, NULL },
	{ "pcid", 0x1, 0, CPUID_ECX, 17, NULL },
	{ "sse4_1", 0x1, 0, CPUID_ECX, 19, "ssse3" },
	{ "sse4_2", 0x1, 0, CPUID_ECX, 20, "sse4_1" },
	{ "x2apic", 0x1, 0, CPUID_ECX, 21, "apic" },
	{ "movbe", 0x1, 0, CPUID_ECX, 22, NULL },
	{ "popcnt", 0x1, 0, CPUID_ECX, 23, NULL },
	{ "tsc_deadline_timer", 0x1, 0, CPUID_ECX, 24, "apic" },
	{ "aes", 0x1, 0, CPUID_ECX, 25, "sse2" },
	{ "xsave", 0x1, 0, CPUID_ECX, 26, "fxsr" },
	{ "avx", 0x1, 0, CPUID_ECX, 28, "xsave" },
	{ "fma", 0x1, 0, CPUID_ECX, 12, "avx" },
	{ "f16c", 0x1, 0, CPUID_ECX, 29, "avx" },
	{ "rdrand", 0x1, 0, CPUID_ECX, 30, NULL },
	{ "hypervisor", 0x1, 0, CPUID_ECX, 31, NULL },
	{ "arat", 0x6, 0, CPUID_EAX, 2, NULL },
	{ "fsgsbase", 0x7, 0, CPUID_EBX, 0, NULL },
	{ "tsc_adjust", 0x7, 0, CPUID_EBX, 1, NULL },
	{ "bmi1", 0x7, 0, CPUID_EBX, 3, NULL },
	{ "hle", 0x7, 0, CPUID_EBX, 4, NULL },
	{ "avx2", 0x7, 0, CPUID_EBX, 5, "avx" },
	{ "smep", 0x7, 0, CPUID_EBX, 7, NULL },
	{ "bmi2", 0x7, 0, CPUID_EBX, 8, NULL },
	{ "erms", 0x7, 0, CPUID_EBX, 9, NULL },
	{ "invpcid", 0x7, 0, CPUID_EBX, 10, "pcid" },
	{ "rtm", 0x7, 0, CPUID_EBX, 11, NULL },
	{ "mpx", 0x7, 0, CPUID_EBX, 14, "xsave" },
	{ "avx512f", 0x7, 0, CPUID_EBX, 16, "avx2" },
	{ "avx512dq", 0x7, 0, CPUID_EBX, 17, "avx512f" },
	{ "rdseed", 0x7, 0, CPUID_EBX, 18, NULL },
	{ "adx", 0x7, 0, CPUID_EBX, 19, NULL },
	{ "smap", 0x7, 0, CPUID_EBX, 20, NULL },
	{ "avx512ifma", 0x7, 0, CPUID_EBX, 21, "avx512f" },
	{ "clflushopt", 0x7, 0, CPUID_EBX, 23, NULL },
	{ "clwb", 0x7, 0, CPUID_EBX, 24, NULL },
	{ "intel_pt", 0x7, 0, CPUID_EBX, 25, NULL },
	{ "avx512pf", 0x7, 0, CPUID_EBX, 26, "avx512f" },
	{ "avx512er", 0x7, 0, CPUID_EBX, 27, "avx512f" },
	{ "avx512cd", 0x7, 0, CPUID_EBX, 28, "avx512f" },
	{ "sha_ni", 0x7, 0, CPUID_EBX, 29, "sse2" },
	{ "avx512bw", 0x7, 0, CPUID_EBX, 30, "avx512f" },
	{ "avx512vl", 0x7, 0, CPUID_EBX, 31, "avx512f" },
	{ "avx512vbmi", 0x7, 0, CPUID_ECX, 1, "avx512bw" },
	{ "umip", 0x7, 0, CPUID_ECX, 2, NULL },
	{ "pku", 0x7, 0, CPUID_ECX, 3, "xsave" },
	{ "waitpkg", 0x7, 0, CPUID_ECX, 5, NULL },
	{ "avx512_vbmi2", 0x7, 0, CPUID_ECX, 6, "avx512bw" },
	{ "shstk", 0x7, 0, CPUID_ECX, 7, "xsave" },
	{ "gfni", 0x7, 0, CPUID_ECX, 8, "sse2" },
	{ "vaes", 0x7, 0, CPUID_ECX, 9, "avx" },
	{ "vpclmulqdq", 0x7, 0, CPUID_ECX, 10, "avx" },
	{ "avx512_vnni", 0x7, 0, CPUID_ECX, 11, "avx512f" },
	{ "avx512_bitalg", 0x7, 0, CPUID_ECX, 12, "avx512bw" },
	{ "avx512_vpopcntdq", 0x7, 0, CPUID_ECX, 14, "avx512f" },
	{ "la57", 0x7, 0, CPUID_ECX, 16, NULL },
	{ "rdpid", 0x7, 0, CPUID_ECX, 22, NULL },
	{ "bus_lock_detect", 0x7, 0, CPUID_ECX, 24, NULL },
	{ "cldemote", 0x7, 0, CPUID_ECX, 25, NULL },
	{ "movdiri", 0x7, 0, CPUID_ECX, 27, NULL },
	{ "movdir64b", 0x7, 0, CPUID_ECX, 28, NULL },
	{ "avx512_4vnniw", 0x7, 0, CPUID_EDX, 2, "avx512f" },
	{ "avx512_4fmaps", 0x7, 0, CPUID_EDX, 3, "avx512f" },
	{ "fsrm", 0x7, 0, CPUID_EDX, 4, NULL },
	{ "avx512_vp2intersect", 0x7, 0, CPUID_EDX, 8, "avx512f" },
	{ "md_clear", 0x7, 0, CPUID_EDX, 10, NULL },
	{ "serialize", 0x7, 0, CPUID_EDX, 14, NULL },
	{ "tsxldtrk", 0x7, 0, CPUID_EDX, 16, "rtm" },
	{ "arch_lbr", 0x7, 0, CPUID_EDX, 19, NULL },
	{ "ibt", 0x7, 0, CPUID_EDX, 20, NULL },
	{ "avx512_fp16", 0x7, 0, CPUID_EDX, 23, "avx512bw" },
	{ "amx_tile", 0x7, 0, CPUID_EDX, 24, "xsave" },
	{ "amx_bf16", 0x7, 0, CPUID_EDX, 22, "amx_tile" },
	{ "amx_int8", 0x7, 0, CPUID_EDX, 25, "amx_tile" },
	{ "spec_ctrl", 0x7, 0, CPUID_EDX, 26, NULL },
	{ "intel_stibp", 0x7, 0, CPUID_EDX, 27, NULL },
	{ "flush_l1d", 0x7, 0, CPUID_EDX, 28, NULL },
	{ "arch_capabilities", 0x7, 0, CPUID_EDX, 29, NULL },
	{ "ssbd", 0x7, 0, CPUID_EDX, 31, NULL },
	{ "avx_vnni", 0x7, 1, CPUID_EAX, 4, "avx2" },
	{ "avx512_bf16", 0x7, 1, CPUID_EAX, 5, "avx512bw" },
	{ "cmpccxadd", 0x7, 1, CPUID_EAX, 7, NULL },
	{ "fzrm", 0x7, 1, CPUID_EAX, 10, NULL },
	{ "fsrs", 0x7, 1, CPUID_EAX, 11, NULL },
	{ "fsrc", 0x7, 1, CPUID_EAX, 12, NULL },
	{ "amx_fp16", 0x7, 1, CPUID_EAX, 21, "amx_tile" },
	{ "avx_ifma", 0x7, 1, CPUID_EAX, 23, "avx2" },
	{ "lam", 0x7, 1, CPUID_EAX, 26, NULL },
	{ "xsaveopt", 0xd, 1, CPUID_EAX, 0, "xsave" },
	{ "xsavec", 0xd, 1, CPUID_EAX, 1, "xsave" },
	{ "xgetbv1", 0xd, 1, CPUID_EAX, 2, "xsave" },
	{ "xsaves", 0xd, 1, CPUID_EAX, 3, "xsave" },
	{ "syscall", 0x80000001, 0, CPUID_EDX, 11, NULL },
	{ "nx", 0x80000001, 0, CPUID_EDX, 20, NULL },
	{ "mmxext", 0x80000001, 0, CPUID_EDX, 22, "mmx" },
	{ "fxsr_opt", 0x80000001, 0, CPUID_EDX, 25, "fxsr" },
	{ "pdpe1gb", 0x80000001, 0, CPUID_EDX, 26, NULL },
	{ "rdtscp", 0x80000001, 0, CPUID_EDX, 27, NULL },
	{ "lm", 0x80000001, 0, CPUID_EDX, 29, NULL },
	{ "3dnowext", 0x80000001, 0, CPUID_EDX, 30, "mmx" },
	{ "3dnow", 0x80000001, 0, CPUID_EDX, 31, "mmx" },
	{ "lahf_lm", 0x80000001, 0, CPUID_ECX, 0, NULL },
	{ "cmp_legacy", 0x80000001, 0, CPUID_ECX, 1, NULL },
	{ "svm", 0x80000001, 0, CPUID_ECX, 2, NULL },
	{ "cr8_legacy", 0x80000001, 0, CPUID_ECX, 4, NULL },
	{ "abm", 0x80000001, 0, CPUID_ECX, 5, NULL },
	{ "sse4a", 0x80000001, 0, CPUID_ECX, 6, "pni" },
	{ "misalignsse", 0x80000001, 0, CPUID_ECX, 7, "sse" },
	{ "3dnowprefetch", 0x80000001, 0, CPUID_ECX, 8, NULL },
	{ "osvw", 0x80000001, 0, CPUID_ECX, 9, NULL },
	{ "xop", 0x80000001, 0, CPUID_ECX, 11, "avx" },
	{ "fma4", 0x80000001, 0, CPUID_ECX, 16, "avx" },
	{ "tbm", 0x80000001, 0, CPUID_ECX, 21, NULL },
	{ "topoext", 0x80000001, 0, CPUID_ECX, 22, NULL },
	{ "perfctr_core", 0x80000001, 0, CPUID_ECX, 23, NULL },
	{ "perfctr_nb", 0x80000001, 0, CPUID_ECX, 24, NULL },
	{ "nonstop_tsc", 0x80000007, 0, CPUID_EDX, 8, NULL },
	{ "clzero", 0x80000008, 0, CPUID_EBX, 0, NULL },
	{ "xsaveerptr", 0x80000008, 0, CPUID_EBX, 2, NULL },
	{ "rdpru", 0x80000008, 0, CPUID_EBX, 4, NULL },
	{ "wbnoinvd", 0x80000008, 0, CPUID_EBX, 9, NULL },
	{ "ibpb", 0x80000008, 0, CPUID_EBX, 12, NULL },
	{ "ibrs", 0x80000008, 0, CPUID_EBX, 14, NULL },
	{ "stibp", 0x80000008, 0, CPUID_EBX, 15, NULL },
	{ "amd_ssbd", 0x80000008, 0, CPUID_EBX, 24, NULL },
	{ "virt_ssbd", 0x80000008, 0, CPUID_EBX, 25, NULL },
	{ "kvm_nopiodelay", 0x40000001, 0, CPUID_EAX, 1, NULL },
	{ "kvmclock", 0x40000001, 0, CPUID_EAX, 3, NULL },
	{ "kvm_asyncpf", 0x40000001, 0, CPUID_EAX, 4, NULL },
	{ "kvm_steal_time", 0x40000001, 0, CPUID_EAX, 5, NULL },
	{ "kvm_pv_eoi", 0x40000001, 0, CPUID_EAX, 6, NULL },
	{ "kvm_pv_unhalt", 0x40000001, 0, CPUID_EAX, 7, NULL },
	{ "kvm_pv_tlb_flush", 0x40000001, 0, CPUID_EAX, 9, "kvm_steal_time" },
	{ "kvm_asyncpf_vmexit", 0x40000001, 0, CPUID_EAX, 10, "kvm_asyncpf" },
	{ "kvm_pv_ipi", 0x40000001, 0, CPUID_EAX, 11, NULL },
	{ "kvm_poll_control", 0x40000001, 0, CPUID_EAX, 12, NULL },
	{ "kvm_pv_sched_yield", 0x40000001, 0, CPUID_EAX, 13, "kvm_steal_time" },
	{ "kvm_asyncpf_int", 0x40000001, 0, CPUID_EAX, 14, "kvm_asyncpf" },
	{ "kvmclock_stable", 0x40000001, 0, CPUID_EAX, 24, "kvmclock" },
	{ NULL, 0, 0, 0, 0, NULL },
};

#define NAME_MAX_LEN 32 /* longer words are no feature's name */

const struct cpu_feature *cpu_feature_find(const char *name, unsigned len)
{
	for (const struct cpu_feature *f = cpu_features; f->name; f++)
		if (strlen(f->name) == len && !memcmp(f->name, name, len))
			return f;
	return NULL;
}

/* How far a name is from a mistyped one; containing it, or contained in it, counts as one step. */
static unsigned farness(const char *name, const char *feature)
{
	unsigned d = word_distance(name, feature);

	if (strlen(name) >= 3 && strlen(feature) >= 3 && (strstr(feature, name) || strstr(name, feature)))
		return MIN(d, 1u);
	return d;
}

void cpu_feature_near(const char *name, char *buf, unsigned len)
{
	unsigned best = strlen(name) < 4 ? 1 : 2, n = 0, used = 0;
	const char *near[5];

	buf[0] = 0;
	if (!*name || strlen(name) >= NAME_MAX_LEN)
		return;
	for (const struct cpu_feature *f = cpu_features; f->name; f++) {
		unsigned d = farness(name, f->name);

		if (d < best)
			n = 0;
		if (d <= best && n < ARRAY_LEN(near)) {
			best = d;
			near[n++] = f->name;
		}
	}
	for (unsigned i = 0; i < n && used < len; i++)
		used += snprintf(buf + used, len - used, "%s%s", i == 0 ? "" : i == n - 1 ? " or " : ", ",
			near[i]);
}

static int unknown_feature(const char *word, unsigned len, struct error *err)
{
	char near[160], name[64];

	snprintf(name, sizeof(name), "%.*s", (int)MIN(len, sizeof(name) - 1), word);
	cpu_feature_near(name, near, sizeof(near));
	if (*near)
		return error_set(err, EINVAL, "--cpu: no feature is named '%s': did you mean %s?", name,
			near);
	return error_set(err, EINVAL,
		"--cpu: no feature is named '%s': names are those of the flags line in /proc/cpuinfo", name);
}

int cpu_spec_next(const char **at, struct cpu_word *w, struct error *err)
{
	const char *word = *at;
	unsigned len;

	for (; *word; word += len + (word[len] == ',')) {
		len = strcspn(word, ",");
		if (*word != '+' && *word != '-') {
			if (len == 4 && !memcmp(word, "host", 4))
				continue;
			return error_set(err, EINVAL,
				"--cpu: '%.*s': accepted are host, +FEATURE and -FEATURE",
				(int)MIN(len, 40u), word);
		}
		w->add = *word == '+';
		w->feature = cpu_feature_find(word + 1, len - 1);
		if (!w->feature)
			return unknown_feature(word + 1, len - 1, err);
		*at = word + len + (word[len] == ',');
		return 1;
	}
	return 0;
}

int arch_cpu_parse(const char *spec, struct error *err)
{
	struct cpu_word w;
	int r;

	if (!*spec)
		return error_set(err, EINVAL, "--cpu: empty: accepted are host, +FEATURE and -FEATURE");
	while ((r = cpu_spec_next(&spec, &w, err)) > 0)
		;
	return r;
}
