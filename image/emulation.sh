# Sourced: lets this machine run arm64 programs while the calling script runs.

EMULATED=/proc/sys/fs/binfmt_misc/k3s-image-arm64

stop_emulating() {
    [ ! -e "$EMULATED" ] || echo -1 >"$EMULATED"
}

# What arm64 programs begin with, in octal for `printf`; and which of these bytes count.
ELF_ARM64='\\x7fELF\\x02\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\xb7\\x00'
ELF_MASK='\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff'

emulate_arm64() {
    ! arch-test arm64 >/dev/null 2>&1 || return 0
    need_programs qemu-aarch64-static:qemu-user-static
    [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    say "arm64 programs run emulated on this machine until this is done"
    trap stop_emulating EXIT
    # F: the emulator is opened now, so that it is found in every tree.
    printf ":k3s-image-arm64:M::$ELF_ARM64:$ELF_MASK:%s:F" "$(command -v qemu-aarch64-static)" \
        >/proc/sys/fs/binfmt_misc/register
    arch-test arm64 >/dev/null || fail "arm64 programs do not run here"
}
