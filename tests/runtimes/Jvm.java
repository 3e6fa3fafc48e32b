import java.lang.invoke.MethodHandle;
import java.lang.invoke.MethodType;
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import jdk.incubator.foreign.CLinker;
import jdk.incubator.foreign.FunctionDescriptor;
import jdk.incubator.foreign.MemoryAddress;
import jdk.incubator.foreign.MemorySegment;
import jdk.incubator.foreign.ResourceScope;

/** Registers memory outside of the heap while threads allocate, the collector runs, and faults become exceptions. */
public class Jvm {
    static final int ACCESS = 1 | 2 | 4;
    static volatile boolean stop;
    static volatile Throwable failure;
    static volatile int[] none;
    static MethodHandle dlsym;

    static MethodHandle verb(String name, Class<?> result, Class<?>... arguments) throws Throwable {
        try (var scope = ResourceScope.newConfinedScope()) {
            var address = (MemoryAddress) dlsym.invokeExact(MemoryAddress.NULL, CLinker.toCString(name, scope).address());
            return link(address, result, arguments);
        }
    }

    static MethodHandle link(MemoryAddress address, Class<?> result, Class<?>... arguments) {
        var layouts = new jdk.incubator.foreign.MemoryLayout[arguments.length];
        for (int i = 0; i < arguments.length; i++) {
            layouts[i] = layout(arguments[i]);
        }
        return CLinker.getInstance().downcallHandle(
            address, MethodType.methodType(result, arguments), FunctionDescriptor.of(layout(result), layouts));
    }

    static jdk.incubator.foreign.MemoryLayout layout(Class<?> type) {
        return type == int.class ? CLinker.C_INT : type == long.class ? CLinker.C_LONG : CLinker.C_POINTER;
    }

    static MemoryAddress must(MemoryAddress address, String what) {
        if (address.equals(MemoryAddress.NULL)) {
            throw new AssertionError(what);
        }
        return address;
    }

    static void churn(int value) {
        try {
            List<byte[]> kept = new ArrayList<>();
            for (int n = 0; !stop; n++) {
                byte[] bytes = new byte[1 + n * 37 % 50000];
                java.util.Arrays.fill(bytes, (byte) value);
                kept.add(bytes);
                ByteBuffer direct = ByteBuffer.allocateDirect(1 + n % 20000);
                while (direct.hasRemaining()) {
                    if (direct.get() != 0) throw new AssertionError("fresh memory is not zero");
                }
                if (kept.size() > 500) {
                    for (byte b : kept.get(n % 500)) if (b != value) throw new AssertionError("bytes changed");
                    kept.subList(0, 250).clear();
                }
                /* Compiled code has no test for null here: the machine's fault becomes the exception. */
                try {
                    none[0]++;
                    throw new AssertionError("no exception");
                } catch (NullPointerException expected) {
                }
            }
        } catch (Throwable thrown) {
            failure = thrown;
        }
    }

    public static void main(String[] args) throws Throwable {
        dlsym = link(CLinker.systemLookup().lookup("dlsym").get(), MemoryAddress.class, MemoryAddress.class, MemoryAddress.class);
        Class<MemoryAddress> pointer = MemoryAddress.class;
        var list = must((MemoryAddress) verb("ibv_get_device_list", pointer, pointer).invokeExact(MemoryAddress.NULL), "no list");
        var device = MemoryAddress.ofLong(list.asSegment(8, ResourceScope.globalScope()).asByteBuffer()
            .order(java.nio.ByteOrder.nativeOrder()).getLong());
        var context = must((MemoryAddress) verb("ibv_open_device", pointer, pointer).invokeExact(must(device, "no device")), "open");
        var pd = must((MemoryAddress) verb("ibv_alloc_pd", pointer, pointer).invokeExact(context), "no PD");
        var register = verb("ibv_reg_mr", pointer, pointer, pointer, long.class, int.class);
        var deregister = verb("ibv_dereg_mr", int.class, pointer);
        var threads = new ArrayList<Thread>();
        for (int i = 1; i <= 2; i++) {
            int value = i;
            threads.add(new Thread(() -> churn(value)));
        }
        threads.forEach(Thread::start);
        for (int round = 0; round < 200 && failure == null; round++) {
            try (var scope = ResourceScope.newConfinedScope()) {
                long size = 1 + round * 7919L % 3_000_000;
                var memory = MemorySegment.allocateNative(size, scope).fill((byte) round);
                var mr = must((MemoryAddress) register.invokeExact(pd, memory.address(), size, ACCESS), "ibv_reg_mr");
                if (round % 50 == 25) {
                    if (!Files.readString(Path.of("/proc/self/maps")).contains("freeflow-pd")) {
                        throw new AssertionError("nothing moved");
                    }
                    System.gc();
                    new ProcessBuilder("true").start().waitFor();
                }
                if ((int) deregister.invokeExact(mr) != 0) throw new AssertionError("ibv_dereg_mr");
                for (byte b : memory.toByteArray()) if (b != (byte) round) throw new AssertionError("bytes changed");
            }
        }
        stop = true;
        for (Thread thread : threads) thread.join();
        if (failure != null) throw failure;
        System.out.println("kept working");
    }
}
