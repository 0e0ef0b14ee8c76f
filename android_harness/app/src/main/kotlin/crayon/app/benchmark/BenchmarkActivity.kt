package crayon.app.benchmark

import android.os.Bundle
import android.view.WindowManager
import android.widget.Button
import android.widget.TextView
import crayon.app.Kind
import crayon.app.R
import crayon.app.Screen
import crayon.app.parts
import crayon.app.view

/** Measures the installed model, and shows the lines. */
class BenchmarkActivity : Screen() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.benchmark)
        setTitle(R.string.benchmark)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON) // a phone that sleeps is slower
        val benchmark = parts.benchmark
        view<Button>(R.id.start).setOnClickListener { begin(Kind.BENCHMARK) { benchmark.run() } }
        view<Button>(R.id.stop).setOnClickListener { parts.work.cancel() }
        watch(benchmark.measured) { view<TextView>(R.id.lines).text = (it.lines + listOfNotNull(it.problem)).joinToString("\n\n") }
        watch(parts.work.running) { running ->
            view<Button>(R.id.start).isEnabled = running == null
            view<Button>(R.id.stop).isEnabled = running?.kind == Kind.BENCHMARK
        }
    }
}
