/* vmm disk: how far it is. In lines of percent as qemu-img has them, or as a bar on a terminal. */
#include <string.h>
#include <unistd.h>
#include "disk.h"
#include "vmm/loop.h"

#define PATIENCE_NS 2000000000ull       /* on a terminal nobody wonders before */
#define BAR_NS      100000000ull
#define BAR_WIDTH   40

void disk_progress_start(struct disk_progress *p, const struct disk_args *a, uint64_t total)
{
	*p = (struct disk_progress){ .wanted = a->progress, .tty = a->tty && !a->quiet, .total = total ? total : 1,
		.start_ns = loop_now() };
	disk_progress_at(p, 0);
}

static void bar(struct disk_progress *p, double part)
{
	char cells[BAR_WIDTH + 1];
	int full = (int)(part * BAR_WIDTH);

	memset(cells, ' ', BAR_WIDTH);
	memset(cells, '#', (size_t)full);
	cells[BAR_WIDTH] = '\0';
	fprintf(stderr, "\r[%s] %5.1f%%", cells, part * 100);
	p->shown = true;
}

void disk_progress_at(struct disk_progress *p, uint64_t done)
{
	double part = (double)done / (double)p->total;
	uint64_t now;

	if (!p->wanted && !p->tty)
		return;
	part = part > 1 ? 1 : part;
	now = loop_now();
	if (p->tty) {
		if (now - p->last_ns < BAR_NS || (!p->wanted && now - p->start_ns < PATIENCE_NS))
			return;
		p->last_ns = now;
		bar(p, part);
	} else if (!p->shown || (unsigned)(part * 100) != p->last) {
		p->last = (unsigned)(part * 100);
		p->shown = true;
		printf("    (%.2f/100%%)\r", part * 100);
		fflush(stdout);
	}
}

void disk_progress_end(struct disk_progress *p, bool complete)
{
	if (complete && p->tty && p->shown)
		bar(p, 1);
	else if (complete && p->wanted && !p->tty)
		printf("    (100.00/100%%)\r");
	if (p->shown)
		fputc('\n', p->tty ? stderr : stdout);
}
