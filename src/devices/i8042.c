/*
 * i8042 keyboard controller without a keyboard: what kernels use it for besides, the reset pulse and A20, and
 * answers that let a driver find out that nobody is there. On machines without legacy devices only the reset.
 */
#include <errno.h>
#include <stdlib.h>
#include "devices/pc.h"
#include "vmm/error.h"

#define STATUS_OUTPUT_FULL 0x01
#define STATUS_SYSTEM      0x04         /* the self test has passed */
#define STATUS_COMMAND     0x08         /* the last write went to port 0x64 */
#define STATUS_UNLOCKED    0x10
#define CONTROL_SYSTEM     0x04
#define CONTROL_OFF        0x30         /* both clocks disabled */
#define OUTPUT_NO_RESET    0x01
#define OUTPUT_A20         0x02

#define CMD_READ_CONTROL   0x20
#define CMD_WRITE_CONTROL  0x60
#define CMD_AUX_OFF        0xa7
#define CMD_AUX_ON         0xa8
#define CMD_AUX_TEST       0xa9
#define CMD_SELF_TEST      0xaa
#define CMD_KBD_TEST       0xab
#define CMD_KBD_OFF        0xad
#define CMD_KBD_ON         0xae
#define CMD_READ_OUTPUT    0xd0
#define CMD_WRITE_OUTPUT   0xd1
#define CMD_PULSE_RESET    0xfe

struct i8042 {
	struct pc_device pc;
	uint8_t status, control, output, data;
	uint8_t command;                /* waits for its byte at port 0x60; 0: none */
};

static void request_reset(struct i8042 *k)
{
	vm_request_stop(k->pc.vm, STOP_RESET, 0, "guest reset (keyboard controller, port 0x64)");
}

static void answer(struct i8042 *k, uint8_t byte)
{
	k->data = byte;
	k->status |= STATUS_OUTPUT_FULL;
}

static void run_command(struct i8042 *k, uint8_t cmd)
{
	k->command = 0;
	k->status |= STATUS_COMMAND;
	switch (cmd) {
	case CMD_READ_CONTROL:
		answer(k, k->control);
		break;
	case CMD_WRITE_CONTROL:
	case CMD_WRITE_OUTPUT:
		k->command = cmd;
		break;
	case CMD_AUX_OFF:
		k->control |= 0x20;
		break;
	case CMD_AUX_ON:
		k->control &= ~0x20;
		break;
	case CMD_SELF_TEST:
		k->status |= STATUS_SYSTEM;
		k->control = CONTROL_OFF | CONTROL_SYSTEM;
		answer(k, 0x55);
		break;
	case CMD_AUX_TEST:
	case CMD_KBD_TEST:
		answer(k, 0);           /* the line is in order */
		break;
	case CMD_KBD_OFF:
		k->control |= 0x10;
		break;
	case CMD_KBD_ON:
		k->control &= ~0x10;
		break;
	case CMD_READ_OUTPUT:
		answer(k, k->output);
		break;
	case CMD_PULSE_RESET:
		request_reset(k);
		break;
	}                               /* others: for devices that are not there */
}

static void take_data(struct i8042 *k, uint8_t val)
{
	k->status &= ~STATUS_COMMAND;
	switch (k->command) {
	case CMD_WRITE_CONTROL:
		k->control = val;
		break;
	case CMD_WRITE_OUTPUT:
		k->output = val | OUTPUT_NO_RESET;
		if (!(val & OUTPUT_NO_RESET))
			request_reset(k);
		break;
	}
	k->command = 0;
}

static uint64_t data_read(void *dev, uint64_t off, unsigned size)
{
	struct i8042 *k = dev;

	(void)off, (void)size;
	k->status &= ~STATUS_OUTPUT_FULL;
	return k->data;
}

static void data_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	(void)off, (void)size;
	take_data(dev, val);
}

static uint64_t status_read(void *dev, uint64_t off, unsigned size)
{
	struct i8042 *k = dev;

	(void)off, (void)size;
	return k->status;
}

static void command_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	(void)off, (void)size;
	run_command(dev, val);
}

static void reset_only_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	(void)off, (void)size;
	if (val == CMD_PULSE_RESET)
		request_reset(dev);
}

static uint64_t reset_only_read(void *dev, uint64_t off, unsigned size)
{
	(void)dev, (void)off, (void)size;
	return 0;                       /* "ready": who is about to write the reset does not wait */
}

static void i8042_reset(void *dev)
{
	struct i8042 *k = dev;

	k->status = STATUS_SYSTEM | STATUS_UNLOCKED;
	k->control = CONTROL_OFF | CONTROL_SYSTEM;
	k->output = OUTPUT_NO_RESET | OUTPUT_A20;
	k->data = k->command = 0;
}

static const struct bus_ops data_ops = { data_read, data_write, 1, 1 };
static const struct bus_ops command_ops = { status_read, command_write, 1, 1 };
static const struct bus_ops reset_only_ops = { reset_only_read, reset_only_write, 1, 1 };

static const struct pc_class i8042_class = {
	.name = "i8042",
	.range = { { 0x60, 1, &data_ops }, { 0x64, 1, &command_ops } },
	.reset = i8042_reset,
};
static const struct pc_class reset_only_class = {
	.name = "i8042",
	.range = { { 0x64, 1, &reset_only_ops } },
	.lockless = true,
};

int i8042_new(struct vm *vm, bool reset_only, struct error *err)
{
	struct i8042 *k = calloc(1, sizeof(*k));

	if (!k)
		return error_set(err, ENOMEM, "no memory for the keyboard controller");
	return pc_device_add(vm, &k->pc, reset_only ? &reset_only_class : &i8042_class, 0, err);
}
