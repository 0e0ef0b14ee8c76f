package crayon.app.benchmark

import android.app.Activity
import android.os.Bundle
import crayon.app.Kind
import crayon.app.parts

/**
 * Begins a benchmark without a screen, for a computer at the other end of the cable:
 *
 *     am start -n crayon.app/.benchmark.HeadlessBenchmarkActivity --es name run1.jsonl [--es job JOB] [--es bundle nano]
 *
 * `crayon profile --target adb: --app` does it. JOB is one of `crayon profile`, as JSON: [crayon.runtime.profile.readJob].
 * Only who holds android.permission.DUMP may start it, as adb's shell does: the manifest asks for that.
 */
class HeadlessBenchmarkActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val job = intent.getStringExtra("job")
        val name = intent.getStringExtra("name") ?: "benchmark.jsonl"
        val bundle = intent.getStringExtra("bundle")
        val benchmark = parts.benchmark
        if (!parts.work.begin(Kind.BENCHMARK) { benchmark.run(job, name, bundle) }) benchmark.refuse(name)
        finish()
    }
}
