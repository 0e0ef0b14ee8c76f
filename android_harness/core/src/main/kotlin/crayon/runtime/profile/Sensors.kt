// What a system tells of a machine while it computes: clocks, temperatures, throttling, energy.
package crayon.runtime.profile

import java.io.IOException
import java.nio.file.Path
import java.nio.file.Paths
import kotlin.io.path.exists
import kotlin.io.path.isDirectory
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.name
import kotlin.io.path.readLines
import kotlin.io.path.readText

/**
 * The sensors of a machine. An app has its own on a phone, where the files of [LinuxSensors] cannot be read: the battery's temperature and power,
 * and the thermal status. What is empty everywhere is told by [absent].
 */
interface Sensors {
    val system: String get() = listOf("os.name", "os.version", "os.arch").joinToString(" ") { System.getProperty(it).orEmpty() }
    val processor: String get() = System.getProperty("os.arch").orEmpty()

    /** Bytes. */
    val memory: Long? get() = null

    fun cores(): List<Core> = List(Runtime.getRuntime().availableProcessors()) { Core(it, null, null) }

    /** Hertz of each core that says it. */
    fun frequency(): List<Long> = emptyList()

    /** Degrees Celsius, by place. */
    fun temperature(): Map<String, Double> = emptyMap()

    /** Counters and states that change when the system slows down. */
    fun throttled(): Map<String, Long> = emptyMap()

    /** Joules since some moment, by counter. */
    fun energy(): Map<String, Double> = emptyMap()

    /** Watts at this moment, by sensor. */
    fun power(): Map<String, Double> = emptyMap()

    /** What the system does not tell now, with the reason. */
    fun absent(): List<Absent> =
        listOf(
            "CPU frequency" to frequency().isEmpty(),
            "temperature" to temperature().isEmpty(),
            "throttling" to throttled().isEmpty(),
            "energy" to (energy().isEmpty() && power().isEmpty()),
        ).filter { it.second }.map { (what, _) -> Absent(what, "the system tells this program nothing of it") }
}

private const val CPUS = "sys/devices/system/cpu"

/**
 * What Linux tells in /sys and /proc.
 *
 * @param root of the file system that has them.
 */
open class LinuxSensors(private val root: Path = Paths.get("/")) : Sensors {
    private val cpus = List(Runtime.getRuntime().availableProcessors()) { it }
    private val zones = found("sys/class/thermal", "thermal_zone\\d+", "temp") + found("sys/class/hwmon", "hwmon\\d+", "temp\\d+_input")
    private val frequencies = cpus.map { root.resolve("$CPUS/cpu$it/cpufreq/scaling_cur_freq") }.filter { it.exists() }
    private val counters = found(CPUS, "cpu\\d+", "thermal_throttle", "\\w+_throttle_count") +
        found("sys/class/thermal", "cooling_device\\d+", "cur_state")

    /** Of RAPL the packages: their parts are within them. */
    private val energies =
        found("sys/class/powercap", "[\\w-]*rapl[\\w-]*:\\d+", "energy_uj") + found("sys/class/hwmon", "hwmon\\d+", "energy\\d+_input")
    private val powers = found("sys/class/hwmon", "hwmon\\d+", "power\\d+_input") + batteries()
    private val wraps = HashMap<Path, Pair<Double, Double>>()

    override val system: String get() = "Linux ${System.getProperty("os.version")} ${System.getProperty("os.arch")}"
    override val processor: String
        get() = lines("proc/cpuinfo").firstOrNull { it.startsWith("model name") }?.substringAfter(':')?.trim()
            ?: lines("proc/device-tree/model").firstOrNull()?.trimEnd('\u0000') ?: super.processor
    override val memory: Long?
        get() = lines(
            "proc/meminfo",
        ).firstOrNull { it.startsWith("MemTotal:") }?.split(Regex("\\s+"))?.getOrNull(1)?.toLongOrNull()?.times(1024)

    override fun cores(): List<Core> =
        cpus.map { cpu ->
            val capacity = number(root.resolve("$CPUS/cpu$cpu/cpu_capacity"))
            Core(cpu, capacity?.toInt(), number(root.resolve("$CPUS/cpu$cpu/cpufreq/cpuinfo_max_freq"))?.times(1000))
        }

    override fun frequency(): List<Long> = frequencies.mapNotNull { number(it)?.times(1000) }

    override fun temperature(): Map<String, Double> = values(zones) { it / 1000.0 }

    override fun throttled(): Map<String, Long> = values(counters) { it }

    override fun energy(): Map<String, Double> =
        energies.mapNotNull { path -> number(path)?.let { name(path) to followed(path, it / 1e6) } }.toMap()

    override fun power(): Map<String, Double> =
        powers
            .mapNotNull { path ->
                val micro = number(path) ?: return@mapNotNull null
                val volts = if (path.name ==
                    "current_now"
                ) {
                    (number(path.resolveSibling("voltage_now")) ?: return@mapNotNull null) / 1e6
                } else {
                    1.0
                }
                name(path) to Math.abs(micro * volts) / 1e6
            }.toMap()

    /** A counter that begins again at 0 goes on. */
    private fun followed(path: Path, joules: Double): Double {
        val (before, added) = wraps[path] ?: (joules to 0.0)
        val more = if (joules < before) (number(path.resolveSibling("max_energy_range_uj")) ?: 0) / 1e6 else 0.0
        wraps[path] = joules to added + more
        return joules + added + more
    }

    /** What discharging batteries give: their power, or their current beside a voltage. */
    private fun batteries(): List<Path> =
        entries(root.resolve("sys/class/power_supply"))
            .filter { text(it.resolve("type")) == "Battery" && text(it.resolve("status")) == "Discharging" }
            .mapNotNull { supply -> listOf("power_now", "current_now").map { supply.resolve(it) }.firstOrNull { it.exists() } }

    private fun <T> values(paths: List<Path>, convert: (Long) -> T): Map<String, T> =
        paths.mapNotNull { path -> number(path)?.let { name(path) to convert(it) } }.toMap()

    /** Files below a folder, by a pattern for each part of the rest of their path. */
    private fun found(folder: String, vararg patterns: String): List<Path> =
        patterns.fold(listOf(root.resolve(folder))) { folders, pattern ->
            folders.flatMap { entries(it).filter { entry -> Regex(pattern).matches(entry.name) } }
        }

    /** The kind of the sensor, where it says one, and its place. */
    private fun name(path: Path): String {
        val stem = path.name.removeSuffix("_input")
        val kind = text(path.resolveSibling("type")) ?: text(path.resolveSibling("name"))
        return listOfNotNull(kind, text(path.resolveSibling("${stem}_label")), path.parent.name, stem).joinToString(" ")
    }

    private fun lines(path: String): List<String> =
        try {
            root.resolve(path).readLines()
        } catch (_: IOException) {
            emptyList()
        }
}

private fun entries(folder: Path): List<Path> =
    try {
        if (folder.isDirectory()) folder.listDirectoryEntries().sortedBy { it.name } else emptyList()
    } catch (_: IOException) {
        emptyList() // as on a phone, where an app may not look
    }

private fun text(path: Path): String? =
    try {
        if (path.exists()) path.readText().trim() else null
    } catch (_: IOException) {
        null
    }

private fun number(path: Path): Long? = text(path)?.toLongOrNull()

/** Bytes of this process, as Linux and Android tell: resident, proportional, resident pages of a folder's files, and the most at once. */
internal class MemoryUse(val rss: Long?, val pss: Long?, val mapped: Long?, val peak: Long?)

internal fun memoryUse(folder: Path, proc: Path = Paths.get("/proc/self")): MemoryUse {
    fun field(file: String, name: String): Long? =
        text(proc.resolve(file))?.lineSequence()?.firstOrNull { it.startsWith("$name:") }?.let(::kilobytes)
    val rss = field("smaps_rollup", "Rss")
    val peak = field("status", "VmHWM")?.let { maxOf(it, rss ?: 0) } // the kernel counts it a little behind
    return MemoryUse(rss, field("smaps_rollup", "Pss"), mapped(proc, folder), peak)
}

private fun mapped(proc: Path, folder: Path): Long? {
    var total = 0L
    var inside = false
    for (line in text(proc.resolve("smaps"))?.lineSequence() ?: return null) {
        if (Regex("^[0-9a-f]+-[0-9a-f]+ ").containsMatchIn(line)) {
            inside = line.split(Regex(" +"), limit = 6).getOrNull(5)?.startsWith("$folder/") == true
        } else if (inside && line.startsWith("Rss:")) {
            total += kilobytes(line) ?: 0
        }
    }
    return total
}

private fun kilobytes(line: String): Long? =
    Regex("""(\d+) kB""")
        .find(line)
        ?.groupValues
        ?.get(1)
        ?.toLongOrNull()
        ?.times(1024)
