package crayon.runtime.profile

import crayon.runtime.BackendError
import crayon.runtime.BundleError
import crayon.runtime.CrayonError
import crayon.runtime.Customizer
import crayon.runtime.Engine
import crayon.runtime.InvalidInput
import crayon.runtime.PoolClient
import crayon.runtime.TrustedKeys
import crayon.runtime.bundle.install
import crayon.runtime.fixtures
import crayon.runtime.servers
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.nio.file.Path
import kotlin.io.path.createDirectories
import kotlin.io.path.writeText
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertIs
import kotlin.test.assertTrue

class ProfileTest {
    @TempDir
    lateinit var folder: Path

    private fun job(work: Work, bundle: Path = fixtures.resolve("nano"), adapter: String? = null, cpus: List<Int>? = null) =
        Job("$bundle", "onnx", adapter, 1, cpus, 0, work)

    private fun records(job: Job): List<Record> = runBlocking { ArrayList<Record>().also { found -> profile(job) { found += it } } }

    /** What Python's tests read: every job of a profile of a customized model, in two processes. */
    @Test
    fun `a profile has every test, and lines that Python reads`() {
        val bundle = install(fixtures.resolve("nano.crayon"), folder.resolve("nano")).path
        runBlocking {
            Engine.load(bundle, threads = 1).use { engine ->
                val client = PoolClient(servers.urls.getValue("real"), TrustedKeys.read(fixtures.resolve("keys.json")))
                assertTrue(Customizer(engine, client).customize(servers.examples).installed)
            }
        }
        val works = listOf(
            Work.Describe,
            Work.Load(first = true),
            Work.Load(first = false),
            Work.Measure(listOf(8, 300), listOf(0, 16), generate = 4, rounds = 2, more = true),
            Work.Measure(listOf(8, 300), listOf(0, 16), generate = 4, rounds = 2, more = true),
            Work.Trace(0, 4),
            Work.Long(0.2),
        )
        val records = works.flatMap { records(readJob(Job.serializer().let { s -> json(job(it, bundle), s) })) }
        fixtures.resolve("profile.jsonl").writeText(records.joinToString("") { it.toJson() + "\n" })
        val observed = records.filterIsInstance<Observation>()
        val tests =
            "load_warm first_token prefill decode ttft swap_none swap_read swap_file affinity routing_answer routing_score control_read " +
                "control_matmul"
        assertEquals(tests.split(' '), observed.map { it.test }.distinct())
        assertTrue(observed.all { o -> o.samplesNs.isNotEmpty() && o.samplesNs.all { it > 0 } })
        val decode = observed.first { it.test == "decode" }
        assertEquals(16, decode.nDepth)
        assertEquals(listOf(4, 4), decode.tokenNs.map { it.size })
        assertEquals(decode.samplesNs, decode.tokenNs.map { it.sum() })
        val sample = records.filterIsInstance<Sample>().first { it.phase == "decode" }
        assertTrue(sample.rssBytes!! > 1_000_000 && sample.peakRssBytes!! >= sample.rssBytes && sample.mappedBytes != null)
        assertEquals(setOf("load_first", "load_cold", "operators"), records.filterIsInstance<Absent>().map { it.what }.toSet() - machine)
    }

    private val machine = setOf("CPU frequency", "temperature", "throttling", "energy")

    private fun json(job: Job, serializer: kotlinx.serialization.KSerializer<Job>) =
        crayon.runtime.COMPACT
            .encodeToString(serializer, job)
            .toByteArray()

    @Test
    fun `an adapter is measured by its name, and cores are not chosen`() {
        val records = records(job(Work.Measure(listOf(4), listOf(0), 2, 1, more = false), adapter = "alice"))
        assertEquals(listOf("alice"), records.filterIsInstance<Observation>().filter { it.test == "decode" }.map { it.adapter })
        val absent = records(job(Work.Measure(listOf(4), listOf(0), 2, 1, more = false), cpus = listOf(0, 1)))
        assertEquals("cores 0,1", assertIs<Absent>(absent.single()).what)
    }

    @Test
    fun `what is not customized, and has no adapters, says so`() {
        val absent = records(
            job(Work.Measure(listOf(4), listOf(0), 2, 1, more = true), bundle = fixtures.resolve("small")),
        ).filterIsInstance<Absent>()
        assertEquals(listOf("adapter swap", "affinity of ten examples", "routing overhead"), absent.map { it.what })
    }

    @Test
    fun `what cannot be measured is an error that becomes a line`() {
        assertFailsWith<InvalidInput> { readJob("{}".toByteArray()) }
        val bad = """{"bundle":"x","backend":"onnx","adapter":null,"threads":1,"cpus":null,"process":0,"work":{"work":"measure","prompts":[0],"depths":[],
            "generate":1,"rounds":1,"more":false}}"""
        assertFailsWith<InvalidInput> { readJob(bad.toByteArray()) }
        val nano = job(Work.Describe)
        assertFailsWith<BackendError> { records(nano.copy(backend = "executorch")) }
        val error = assertFailsWith<CrayonError> { records(job(Work.Describe, bundle = folder.resolve("nothing"))) }
        assertIs<BundleError>(error)
        assertContains(failure(error).toJson(), """"type":"failure","error":"BundleError"""")
        assertFailsWith<BundleError> { records(nano.copy(adapter = "carol")) }
    }

    @Test
    fun `sensors are those of Linux, and their absence is told`() {
        fun write(path: String, text: String) = folder.resolve(path).also { it.parent.createDirectories() }.writeText("$text\n")
        assertEquals(4, LinuxSensors(folder).absent().size)
        write("sys/class/thermal/thermal_zone0/temp", "41500")
        write("sys/class/thermal/thermal_zone0/type", "cpu")
        write("sys/class/thermal/cooling_device0/cur_state", "2")
        write("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1800000")
        write("sys/devices/system/cpu/cpu0/cpu_capacity", "512")
        write("sys/class/powercap/intel-rapl:0/energy_uj", "5000000")
        write("sys/class/powercap/intel-rapl:0/max_energy_range_uj", "6000000")
        write("sys/class/powercap/intel-rapl:0:1/energy_uj", "1")
        write("sys/class/power_supply/bat/type", "Battery")
        write("sys/class/power_supply/bat/status", "Discharging")
        write("sys/class/power_supply/bat/current_now", "-500000")
        write("sys/class/power_supply/bat/voltage_now", "4000000")
        write("proc/meminfo", "MemTotal:       1000 kB")
        write("proc/cpuinfo", "model name : A CPU")
        val sensors = LinuxSensors(folder)
        assertEquals(emptyList(), sensors.absent())
        assertEquals(mapOf("cpu thermal_zone0 temp" to 41.5), sensors.temperature())
        assertEquals(mapOf("cooling_device0 cur_state" to 2L), sensors.throttled())
        assertEquals(listOf(1_800_000_000L), sensors.frequency())
        assertEquals(512, sensors.cores().first().capacity)
        assertEquals(mapOf("intel-rapl:0 energy_uj" to 5.0), sensors.energy())
        write("sys/class/powercap/intel-rapl:0/energy_uj", "1000000")
        assertEquals(7.0, sensors.energy().values.single(), 1e-9)
        assertEquals(2.0, sensors.power().values.single(), 1e-9)
        assertEquals("A CPU" to 1_024_000L, sensors.processor to sensors.memory)
    }
}
