package crayon.app

import crayon.runtime.fixtures
import crayon.runtime.servers
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.nio.file.Path
import kotlin.io.path.copyTo
import kotlin.test.assertContains
import kotlin.test.assertTrue

class AfternoonTest {
    @Test
    fun `the assistant of the page answers and learns`(
        @TempDir folder: Path,
    ) = runBlocking {
        fixtures.resolve("keys.json").copyTo(folder.resolve("keys.json"))
        val assistant = Assistant(folder, servers.urls.getValue("real"))
        assistant.start(fixtures.resolve("signed.crayon"))
        val shown = StringBuilder()
        assistant.ask("set an alarm for six") { shown.append(it) }
        assertTrue(shown.isNotEmpty())
        assertContains(assistant.learn(servers.examples), "it changes what the model says")
    }
}
